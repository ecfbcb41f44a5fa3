# make demo | test | lint | bench | kernels | gpu | clean
#
# demo and test do all of their own set-up, once: .venv (with the torch the active Python has, else the pinned one),
# requirements, the native build. PYTHON=... picks the Python, TORCH=... another torch, MAX_JOBS=... limits the build.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
CXX    ?= g++
OUT    ?= bench/results
JOBS   := $(shell nproc 2>/dev/null || echo 2)
PY     := .venv/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install -q
# An installed torch is never replaced: pip sees its exact version as a constraint.
PINNED := -c .venv/torch.txt
.DEFAULT_GOAL := help
.PHONY: help tools native native-demo demo test lint bench kernels gpu clean

help:
	@grep -m1 '^# make' Makefile | cut -c3-

tools:
	@command -v $(PYTHON) >/dev/null || { echo "pydl: no $(PYTHON): install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "pydl: $(PYTHON) is older than 3.10: make PYTHON=python3.12 ..." >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "pydl: no C++ compiler ($(CXX)): install g++ >= 11 or set CXX" >&2; exit 1; }

# A virtual environment that also sees the active Python's packages when torch is among them. (venv's own
# --system-site-packages would skip them where the active Python is itself a virtual environment.)
$(PY): | tools
	@$(PYTHON) -m venv .venv || { echo "pydl: $(PYTHON) -m venv failed: install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys, importlib.util as u; u.find_spec("torch") and print("import site", *(f"site.addsitedir({p!r})" for p in sys.path if p.endswith("-packages")), sep="; ")' \
	  > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active_python.pth"

# The order matters: torch first, then what goes with the torch that is there.
.venv/base.stamp: pyproject.toml | tools $(PY)
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) numpy '$(TORCH)'
	@$(PY) -c 'import torch; print("torch==" + torch.__version__)' > .venv/torch.txt
	@$(PY) -c 'import torch, sys; v = torch.__version__; sys.exit("pydl: torch %s is installed, 2.11 or newer is needed" % v if tuple(map(int, v.split(".")[:2])) < (2, 11) else 0)'
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) $(PINNED) 'triton>=3.6' || echo "pydl: no triton for this platform; its kernels are skipped"
	$(PIP) $(PINNED) 'setuptools>=77' wheel 'ninja>=1.11' 'pybind11>=2.12' numpy
	@cuda=$$($(PY) -c 'import torch; print(torch.version.cuda or "")'); \
	  if [ -n "$$cuda" ] && [ -z "$$CUDA_HOME" ] && ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then \
	    $(PIP) $(PINNED) $$(for p in nvcc crt cccl runtime; do echo "nvidia-cuda-$$p==$$cuda.*"; done) "nvidia-nvvm==$$cuda.*" \
	      || echo "pydl: no nvcc wheel for CUDA $$cuda: install the CUDA toolkit to build the CUDA kernels"; fi
	@touch $@

.venv/demo.stamp: .venv/base.stamp
	PYDL_SKIP_NATIVE=1 $(PIP) $(PINNED) --no-build-isolation -e '.[demo]'
	@touch $@

.venv/test.stamp: .venv/base.stamp
	PYDL_SKIP_NATIVE=1 $(PIP) $(PINNED) --no-build-isolation -e '.[demo,test,lint]'
	@touch $@ .venv/demo.stamp

# The CUDA library can be built without a GPU; the demo leaves it out where torch could not load it.
native: .venv/base.stamp
	@$(PY) setup.py -q build_ext --inplace

native-demo: .venv/base.stamp
	@cuda=$$($(PY) -c 'import torch; print(torch.version.cuda or "")'); \
	  [ -n "$$cuda" ] || export PYDL_CUDA_ARCHS=none; $(PY) setup.py -q build_ext --inplace

demo: tools .venv/demo.stamp native-demo
	@$(PY) examples/train_digits.py $(ARGS)

test: tools .venv/test.stamp native lint
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist worksteal -q $(ARGS)

lint: tools .venv/test.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@tool=$$($(PY) -c 'import clang_format as c; print(c.__path__[0] + "/data/bin/clang-format")' 2>/dev/null); \
	  if [ -n "$$tool" ]; then find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs "$$tool" --dry-run -Werror; \
	  else echo "pydl: no clang-format here, the formatting of csrc is not checked"; fi

bench: tools .venv/demo.stamp native
	$(PY) bench/run.py $(ARGS)

kernels: tools .venv/demo.stamp native
	$(PY) -m pydl kernels $(ARGS)

# For a machine with a GPU and no network: nothing is installed, the active Python is used as it is.
gpu:
	$(PYTHON) bench/gpu.py --out $(OUT) $(ARGS)

clean:
	rm -rf build dist *.egg-info pydl/_lib pydl/_C*.so .pytest_cache .mypy_cache .ruff_cache
