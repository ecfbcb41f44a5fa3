"""What gets installed, from where it can be imported, and what the native libraries ask of torch."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import pydl

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = sorted((ROOT / "pydl/_lib").glob("*.so"))
needs_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
needs_binutils = pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="no binutils")


def run(*command, cwd, expect=0, **env):
    """Run a command with a clean PYTHONPATH; returns its completed process."""
    full = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("PYDL_")} | env
    done = subprocess.run([*map(str, command)], cwd=cwd, env=full, capture_output=True, text=True, check=False)
    assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def python(code, cwd, **env):
    return run(sys.executable, "-c", code, cwd=cwd, **env).stdout


def build_wheel(out, **env):
    """A wheel from the checkout, all by-products in ``out``; ninja finds its objects already built."""
    command = ["egg_info", "--egg-base", out, "build", "--build-base", out / "b", "bdist_wheel", "--dist-dir", out]
    run(sys.executable, "setup.py", "-q", *command, "--bdist-dir", out / "w", cwd=ROOT, **env)
    (wheel,) = out.glob("*.whl")
    return wheel


def kernel_modules():
    return {f"pydl/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}


def test_wheel(tmp_path):
    wheel = build_wheel(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {n.split("/")[0] for n in names}
    assert tops == {"pydl", f"pydl_kernels-{pydl.__version__}.dist-info"}, "nothing else at the top, no `kernels`"
    assert kernel_modules() | {"pydl/kernels/__init__.py"} <= names
    assert {str(p.relative_to(ROOT)) for p in LIBRARIES} <= names
    assert "pydl/_lib/build.json" in names
    assert any(re.match(r"pydl/_C\..*so$", n) for n in names)
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "pydl").rglob("*.py")} <= names
    assert "py3-none-any" not in wheel.name

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import pydl, pydl.kernels, pydl._library, importlib.util as u; "
        "from importlib.metadata import version; "
        "print(pydl.__file__, pydl.kernels.__path__, u.find_spec('kernels'), version('pydl-kernels'), "
        "pydl._library.cpu_library().loaded)"
    )
    out = python(code, tmp_path, PYTHONPATH=str(site))
    folder = f"['{site / 'pydl/kernels'}']"
    assert out.split() == [str(site / "pydl/__init__.py"), folder, "None", pydl.__version__, "True"]


def test_pure_wheel(tmp_path):
    wheel = build_wheel(tmp_path, PYDL_SKIP_NATIVE="1")
    assert wheel.name.endswith("py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not any(n.endswith(".so") for n in names)
    assert kernel_modules() <= names


@needs_checkout
def test_editable_install(tmp_path):
    hook = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    run(sys.executable, "-c", hook, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import site; site.addsitedir({str(site)!r}); import importlib.util as u; "
        "import pydl, pydl.kernels._launch as k; print(pydl.__file__, k.__file__, u.find_spec('kernels'))"
    )
    # -I: nothing but the editable install can supply the package
    out = run(sys.executable, "-I", "-c", code, cwd=tmp_path).stdout
    assert out.split() == [str(ROOT / "pydl/__init__.py"), str(ROOT / "kernels/_launch.py"), "None"]


@needs_checkout
def test_bare_clone_without_triton_and_native_code(tmp_path):
    listing = run("git", "ls-files", "-co", "--exclude-standard", "pydl", "kernels", "csrc", cwd=ROOT).stdout
    for name in listing.splitlines():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    code = """
import sys
sys.modules["triton"] = None
import torch, pydl, pydl.kernels, pydl._library
import pydl.functional as F
assert not pydl._library.cpu_library().loaded and "not built" in pydl._library.cpu_library().reason
x = torch.randn(2, 3, 8, 8, requires_grad=True)
torch.testing.assert_close(F.max_pool2d(x, 2), torch.nn.functional.max_pool2d(x, 2))
y = F.layer_norm(x, (8,))
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))
y.sum().backward()
print(pydl.__file__)
from pydl.__main__ import main
main(["info"])
"""
    out = python(code, tmp_path)
    assert out.startswith(str(tmp_path))
    assert "python setup.py build_ext --inplace" in out and 'pip install "triton>=3.6"' in out


def test_hugging_face_kernels_wins_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("name = 'the other package'\n")
    code = "import kernels, pydl.kernels; print(kernels.name, pydl.kernels.__path__)"
    out = python(code, ROOT, PYTHONPATH=str(tmp_path))
    assert out.startswith("the other package") and str(ROOT / "kernels") in out


def test_info_names_conflicts_and_environment(tmp_path):
    for name in ("pydl", "kernels"):
        folder = tmp_path / f"{name}-0.7.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.7\n")
    command = [sys.executable, "-m", "pydl", "info", "--json"]
    report = json.loads(run(*command, cwd=ROOT, PYTHONPATH=str(tmp_path), PYDL_DISABLE="relu").stdout)
    assert any("astronomy" in c and "pip uninstall pydl" in c for c in report["conflicts"])
    assert any("Hugging Face" in c for c in report["conflicts"])
    assert report["environment"] == {"PYDL_DISABLE": "relu"} | (
        {"TRITON_INTERPRET": "1"} if "TRITON_INTERPRET" in os.environ else {}
    )
    assert report["versions"]["torch"] == torch.__version__
    assert {row[0] for row in report["ops"]} >= {"layer_norm", "max_pool2d", "relu"}


def test_command_line_refuses_unknown_commands():
    from pydl.__main__ import main

    assert main(["no_such_command"]) == 2
    assert main(["--help"]) == 0


def test_version_has_one_source():
    assert pydl.__version__ == re.search(r'= "(.+)"', (ROOT / "pydl/_version.py").read_text())[1]
    try:
        assert importlib.metadata.version("pydl-kernels") == pydl.__version__
    except importlib.metadata.PackageNotFoundError:
        pass  # a checkout that was never installed has no metadata to agree with


# ---------------------------------------------------------------- errors of the build


def setup_py(*arguments, expect=1, before="pass", **env):
    code = f"import sys, runpy; {before}; sys.argv = ['setup.py', *{arguments!r}]; runpy.run_path('setup.py')"
    return run(sys.executable, "-c", code, cwd=ROOT, expect=expect, **env).stderr.strip().splitlines()


def test_build_without_torch_names_the_flag():
    errors = setup_py("build_ext", "--inplace", before="sys.modules['torch'] = None")
    assert errors[-1].startswith("pydl: no torch in this Python") and "--no-build-isolation" in errors[-1]


def test_build_without_a_compiler_is_one_line():
    errors = setup_py("ninja", "--target", "cpu", CXX="no-such-compiler")
    assert errors[-1].startswith("pydl: no C++ compiler (no-such-compiler)") and "PYDL_SKIP_NATIVE" in errors[-1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_bad_cuda_targets_are_refused():
    errors = setup_py("ninja", "--target", "cuda", PYDL_CUDA_ARCHS="8.0;potato")
    assert "'potato'" in errors[-1]


# ---------------------------------------------------------------- native libraries


def shim_names():
    """Functions of torch's stable C interface, from its headers."""
    include = Path(torch.__file__).parent / "include/torch/csrc"
    headers = [*(include / "inductor/aoti_torch/c").glob("*.h"), *(include / "stable/c").glob("*.h")]
    return {n for h in headers for n in re.findall(r"\b(?:aoti_)?torch_\w+", h.read_text())}


@needs_binutils
@pytest.mark.skipif(not LIBRARIES, reason="no native library is built")
def test_libraries_use_the_stable_interface_only():
    allowed = shim_names()
    assert "aoti_torch_get_data_ptr" in allowed
    for library in LIBRARIES:
        lines = run("nm", "-D", "--undefined-only", library, cwd=ROOT).stdout.splitlines()
        for kind, name in (line.split()[-2:] for line in lines):
            system = re.search(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_", name) or kind in "wv"
            assert system or name in allowed, f"{library.name} needs {name}, which is not in the stable set"


@needs_binutils
@pytest.mark.skipif(not LIBRARIES, reason="no native library is built")
def test_libraries_need_only_libtorch_and_the_system():
    system = r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d+|ld-linux.*"
    for library in LIBRARIES:
        dynamic = run("readelf", "-d", library, cwd=ROOT).stdout
        needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
        assert "libtorch.so" in needed
        assert all(n in ("libtorch.so", "libtorch_cpu.so") or re.fullmatch(system, n) for n in needed), needed
        assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


@needs_binutils
def test_wide_copies_share_no_inline_function():
    """A weak function compiled for AVX-512 could be the one the linker keeps for baseline code."""
    if not (objects := sorted((ROOT / "build/cpu").glob("*.avx*.o"))):
        pytest.skip("no objects of wider ISA levels")
    for path in objects:
        level = path.name.split(".")[1]
        symbols = run("nm", "-C", "--defined-only", path, cwd=ROOT).stdout
        weak = [line[19:] for line in symbols.splitlines() if line[17:18] in "WVu"]
        shared = [name for name in weak if f"pydl::{level}::" not in name]
        assert not shared, f"{path.name}: {shared[:5]}"


@pytest.mark.skipif(importlib.util.find_spec("pydl._C") is None, reason="pydl._C is not built for this Python")
def test_extension_tells_facts():
    from pydl import _C

    info = _C.build_info()
    assert info["extension_version"] == info["version"] == pydl.__version__
    assert info["torch_target"] == "0x020b000000000000"
    assert info["compiler"] and info["isa_levels"] == ["baseline", "avx2", "avx512"]
    assert all(row["registers"] > 0 for row in _C.kernel_resources())


@pytest.mark.skipif(importlib.util.find_spec("pydl._C") is None, reason="pydl._C is not built for this Python")
def test_cuda_kernels_do_not_spill():
    from pydl import _C

    if not (rows := [row for row in _C.kernel_resources() if row["arch"] in ("80", "90")]):
        pytest.skip("libpydl_cuda.so was not compiled for sm_80 or sm_90 here")
    spills = [f"{r['kernel']} on sm_{r['arch']}: {r['spill_stores']} bytes" for r in rows if r["spill_stores"]]
    assert not spills, "\n".join(spills)


@pytest.mark.skipif(importlib.util.find_spec("pydl._C") is None, reason="pydl._C is not built for this Python")
def test_cpu_level_can_be_lowered():
    path = importlib.util.find_spec("pydl._C").origin
    # by file, because importing the package would load torch each time
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('pydl._C', {path!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); print(m.cpu_capability())"
    )
    levels = ["baseline", "avx2", "avx512"]
    highest = levels.index(python(code, ROOT).strip())
    for wanted in levels:
        out = python(code, ROOT, PYDL_CPU_CAPABILITY=wanted).strip()
        assert out == levels[min(levels.index(wanted), highest)]
