"""Build of pydl: writes build/build.ninja, runs ninja, and hands the results to setuptools.

python setup.py build_ext --inplace          libpydl_cpu.so, libpydl_cuda.so (if nvcc is found) and pydl._C, in place
python setup.py ninja --target simt          one target: cpu, cuda, ext, simt, simt_asan

Environment: PYDL_SKIP_NATIVE=1 (pure Python), PYDL_CUDA_ARCHS="8.0;9.0+PTX" (or "none"), CUDA_HOME, CXX, MAX_JOBS.
"""

import fcntl
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
TORCH_TARGET_VERSION = "0x020b000000000000"  # stable ABI of torch 2.11
SKIP_NATIVE = os.environ.get("PYDL_SKIP_NATIVE", "") not in ("", "0")
EXT = f"pydl/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
LIB_CPU, LIB_CUDA = "pydl/_lib/libpydl_cpu.so", "pydl/_lib/libpydl_cuda.so"
FACTS = "pydl/_lib/build.json"
LIB_SIMT, LIB_SIMT_ASAN = "build/libpydl_simt.so", "build/libpydl_simt_asan.so"
LIBRARIES = {"cpu": LIB_CPU, "cuda": LIB_CUDA, "ext": EXT, "simt": LIB_SIMT, "simt_asan": LIB_SIMT_ASAN}

BASE_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
ISA_LEVELS = {"baseline": [], "avx2": [], "avx512": []}
if platform.machine() in ("x86_64", "AMD64"):
    _QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    _AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    ISA_LEVELS = {
        "baseline": ["-msse4.2", "-mpopcnt"],
        "avx2": _AVX2,
        # gcc 12's own AVX-512 headers read values they leave undefined on purpose
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2, *_QUIET],
    }
SIMT_FLAGS = ["-DPYDL_SIMT", "-Icsrc/simt/include", "-Wno-unknown-pragmas"]
ASAN_FLAGS = ["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def fail(message):
    raise SystemExit(f"pydl: {message}")


def version():
    return re.search(r'__version__ = "(.+?)"', (ROOT / "pydl/_version.py").read_text())[1]


# ---------------------------------------------------------------- tools and paths


@lru_cache
def torch_facts():
    """(folder, version, CUDA version or None) of the active Python's torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        fail(
            "no torch in this Python: install torch >= 2.11 and build with --no-build-isolation "
            "(PYDL_SKIP_NATIVE=1 builds without native code)"
        )
    folder = Path(spec.submodule_search_locations[0])
    text = (folder / "version.py").read_text()
    cuda = re.search(r"^cuda.*= '([\d.]+)'", text, re.M)
    return folder, re.search(r"^__version__ = '(.+?)'", text, re.M)[1], cuda and cuda[1]


def cxx():
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        fail(f"no C++ compiler ({compiler}): install g++ >= 11, set CXX, or set PYDL_SKIP_NATIVE=1 to do without")
    return compiler


def nvcc():
    """Path of nvcc: CUDA_HOME, PATH, the nvidia-cuda-nvcc wheel or /usr/local/cuda; None when there is none."""
    if os.environ.get("PYDL_CUDA_ARCHS", "").strip().lower() == "none":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    torch_site = torch_facts()[0].parent / "nvidia"
    found = [Path(home) / "bin/nvcc"] if home else []
    found += [Path(p) for p in [shutil.which("nvcc")] if p]
    found += [s / f / "bin/nvcc" for s in (site, torch_site) for f in ("cu13", "cuda_nvcc")]
    found += [Path("/usr/local/cuda/bin/nvcc")]
    return next((p for p in found if os.access(p, os.X_OK)), None)


def cuda_folders(kind):
    """Folders of CUDA's headers ("include") or libraries ("lib") beside nvcc and in torch's nvidia wheels."""
    tool = nvcc()
    dryrun = subprocess.run([tool, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = Path(re.search(r"^#\$ TOP=(.+)$", dryrun, re.M)[1].strip()).resolve()
    wheels = [torch_facts()[0].parent / "nvidia" / name for name in ("cu13", "cuda_runtime")]
    names = ("include",) if kind == "include" else ("lib64", "lib")
    return [str(base / name) for base in (top, *wheels) for name in names if (base / name).is_dir()]


def cuda_archs():
    """Targets as [("80", False), ...]; the flag asks for PTX as well."""
    text = os.environ.get("PYDL_CUDA_ARCHS")
    known = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if text is None:
        wanted = DEFAULT_ARCHS if torch_facts()[2] else "8.0;9.0+PTX"
        archs = [a for a in wanted.split(";") if "sm_" + a.split("+")[0].replace(".", "") in known]
    else:
        archs = [a.strip() for a in re.split(r"[;,\s]+", text) if a.strip()]
    parsed = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not match or "sm_" + "".join(match.group(1, 2)) not in known:
            fail(f"PYDL_CUDA_ARCHS={text!r}: {arch!r} is not a target of {nvcc()} (example: '8.0;9.0+PTX')")
        parsed.append(("".join(match.group(1, 2, 3)), bool(match[4])))
    return parsed


# ---------------------------------------------------------------- build.ninja


class NinjaFile:
    """Rules and edges; paths are relative to the repository's root."""

    def __init__(self):
        self.lines = ["ninja_required_version = 1.8", "builddir = build", ""]

    def rule(self, name, command, depfile=True, description=""):
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {description or name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]
        self.lines.append("")

    def edge(self, rule, out, inputs, flags=()):
        def path(p):
            return re.sub(r"([$ :])", r"$\1", str(p))

        self.lines.append(f"build {path(out)}: {rule} {' '.join(path(p) for p in inputs)}")
        if flags:
            self.lines.append("  flags = " + " ".join(shlex.quote(f).replace("$", "$$") for f in flags))
        return out


def sources(pattern):
    return [p.relative_to(ROOT) for p in sorted(ROOT.glob(pattern))]


def torch_flags():
    return ["-Icsrc", "-isystem", str(torch_facts()[0] / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]


def link_flags():
    return ["-Wl,--no-as-needed", f"-L{torch_facts()[0] / 'lib'}", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]


def cpu_edges(n):
    """Every csrc/cpu/<op>.cpp once per ISA level; csrc/cpu/_*.cpp holds what all levels share, compiled once."""
    objects = []
    for source in sources("csrc/cpu/*.cpp"):
        levels = list(ISA_LEVELS)[: 1 if source.name.startswith("_") else None]
        for level in levels:
            flags = [*BASE_FLAGS, *ISA_LEVELS[level], f"-DPYDL_ISA={level}"]
            flags += [f"-DPYDL_ISA_LEVEL={levels.index(level)}", *torch_flags()]
            objects.append(n.edge("cxx", f"build/cpu/{source.stem}.{level}.o", [source], flags))
    return n.edge("link", LIB_CPU, objects, link_flags()) if objects else None


def ext_edges(n):
    """pydl._C: one small pybind11 module per Python."""
    if not (ROOT / "csrc/module.cpp").exists():
        return None
    spec = importlib.util.find_spec("pybind11")
    if spec is None:
        fail("no pybind11 in this Python: pip install pybind11 ninja setuptools, then build with --no-build-isolation")
    pybind = Path(spec.submodule_search_locations[0]) / "include"
    flags = [*BASE_FLAGS, "-isystem", str(pybind), "-isystem", sysconfig.get_path("include"), "-Icsrc"]
    facts = {"VERSION": version(), "TORCH_VERSION": torch_facts()[1], "TARGET": TORCH_TARGET_VERSION}
    flags += [f'-DPYDL_{name}="{value}"' for name, value in facts.items()]
    flags += [f'-DPYDL_CXXFLAGS="{" ".join(BASE_FLAGS)}"']
    isa = [f"build/cpu/{s.stem}.baseline.o" for s in sources("csrc/cpu/_isa.cpp")]
    flags += [f"-DPYDL_HAS_ISA={len(isa)}"]
    folder = "build/ext/" + str(sysconfig.get_config_var("SOABI"))
    objects = [n.edge("cxx", f"{folder}/module.o", ["csrc/module.cpp"], flags), *isa]
    return n.edge("link", EXT, objects)


def cuda_edges(n):
    """Every csrc/cuda/*.cu by nvcc; ptxas' report of registers and spills stays beside each object."""
    if nvcc() is None or not sources("csrc/cuda/*.cu"):
        return None
    flags = ["-x", "cu", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v", "-DUSE_CUDA"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-ccbin", shlex.split(cxx())[0]]
    for arch, ptx in cuda_archs():
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"] if ptx else []
    flags += [f for folder in cuda_folders("include") for f in ("-isystem", folder)] + torch_flags()
    objects = [n.edge("nvcc", f"build/cuda/{s.stem}.o", [s], flags) for s in sources("csrc/cuda/*.cu")]
    libs = [*(f"-L{folder}" for folder in cuda_folders("lib")), "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return n.edge("link", LIB_CUDA, objects, [*link_flags(), *libs])


def simt_edges(n, out, name, extra):
    """The CUDA sources once more, compiled for the host against csrc/simt (tests only)."""
    inputs = sources("csrc/cuda/*.cu") + sources("csrc/simt/*.cpp")
    if not inputs:
        return None
    base = [f for f in BASE_FLAGS if f != "-O3"] + (extra or ["-O2", "-g1"])
    flags = [*base, *SIMT_FLAGS, *torch_flags()]
    objects = [
        n.edge("cxx", f"build/{name}/{s.stem}.o", [s], [*flags, "-x", "c++"] if s.suffix == ".cu" else flags)
        for s in inputs
    ]
    return n.edge("link", out, objects, [*link_flags(), *(f for f in extra if f.startswith("-fsanitize"))])


def write_ninja():
    n = NinjaFile()
    n.rule("cxx", f"{cxx()} $flags -MMD -MF $out.d -c $in -o $out")
    n.rule("link", f"{cxx()} -shared -o $out $in $flags -Wl,--exclude-libs,ALL", depfile=False)
    report = "> $out.ptxas 2>&1 || { cat $out.ptxas; exit 1; }; grep -v -e 'ptxas info' -e 'bytes stack frame' "
    n.rule("nvcc", f"{nvcc()} $flags -MD -MF $out.d -c $in -o $out {report} $out.ptxas || true")
    built = {
        "cpu": cpu_edges(n),
        "ext": ext_edges(n),
        "cuda": cuda_edges(n),
        "simt": simt_edges(n, LIB_SIMT, "simt", []),
        "simt_asan": simt_edges(n, LIB_SIMT_ASAN, "simt_asan", ASAN_FLAGS),
    }
    for target, out in built.items():
        n.edge("phony", target, [out] if out else [])
    text = "\n".join(n.lines) + "\n"
    BUILD.mkdir(exist_ok=True)
    (ROOT / "pydl/_lib").mkdir(exist_ok=True)
    path = BUILD / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return {target: out for target, out in built.items() if out}


def run_ninja(targets):
    """Builds the targets and returns the files made; one process at a time per checkout."""
    spec = importlib.util.find_spec("ninja")
    tool = [sys.executable, "-m", "ninja"] if spec else [shutil.which("ninja")]
    if tool[0] is None:
        fail("no ninja in this Python: pip install ninja, then build with --no-build-isolation")
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = write_ninja()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        status = subprocess.run([*tool, "-f", "build/build.ninja", "-j", jobs, *targets], cwd=ROOT, check=False)
        if status.returncode:
            raise SystemExit(status.returncode)
        write_facts()
    return [built[target] for target in targets if target in built]


# ---------------------------------------------------------------- facts about what was built


def kernel_resources():
    """Rows from ptxas' reports: kernel, arch, registers, spill bytes, static shared memory, stack."""
    rows = []
    reports = [BUILD / f"cuda/{source.stem}.o.ptxas" for source in sources("csrc/cuda/*.cu")]
    for report in filter(Path.exists, reports):
        pattern = (
            r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
        )
        for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, report.read_text(), re.S):
            shared = re.search(r"(\d+) bytes smem", rest)
            row = {"source": report.name.split(".")[0], "kernel": name, "arch": arch, "registers": int(registers)}
            row |= {"spill_stores": int(stores), "spill_loads": int(loads), "stack": int(stack)}
            rows.append(row | {"shared": int(shared[1]) if shared else 0})
    names = [row["kernel"] for row in rows]
    if names and shutil.which("c++filt"):
        readable = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
        for row, name in zip(rows, readable.stdout.splitlines()):
            row["kernel"] = name.replace("(anonymous namespace)::", "")
    return rows


def write_facts():
    """build.json, read by pydl._C and `python -m pydl info`: how the libraries beside it were built."""
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    git = subprocess.run(describe, capture_output=True, text=True, check=False)
    compiler = subprocess.run([*shlex.split(cxx()), "--version"], capture_output=True, text=True, check=True).stdout
    path = ROOT / FACTS
    old = json.loads(path.read_text()) if path.exists() and (ROOT / LIB_CUDA).exists() else {}
    facts = {
        "version": version(),
        "commit": git.stdout.strip() or None,
        "compiler": compiler.splitlines()[0],
        "flags": " ".join(BASE_FLAGS),
        "isa_levels": list(ISA_LEVELS),
        "torch_version": torch_facts()[1],
        "torch_target": TORCH_TARGET_VERSION,
        "nvcc": old.get("nvcc"),
        "cuda_archs": old.get("cuda_archs", []),
        "kernels": kernel_resources(),
    }
    if nvcc():
        facts["nvcc"] = str(nvcc())
        facts["cuda_archs"] = [arch + ("+PTX" if ptx else "") for arch, ptx in cuda_archs()]
    path.write_text(json.dumps(facts, indent=1) + "\n")


# ---------------------------------------------------------------- setuptools commands


class Ninja(Command):
    description = "write build/build.ninja and build one target"
    user_options = [("target=", None, f"one of {', '.join(LIBRARIES)}")]

    def initialize_options(self):
        self.target = None

    def finalize_options(self):
        if self.target not in LIBRARIES:
            fail(f"--target {self.target}: must be one of {', '.join(LIBRARIES)}")

    def run(self):
        made = run_ninja([self.target])
        print(made[0] if made else f"pydl: nothing to build for target {self.target}")


class BuildExt(build_ext):
    """Builds in the checkout through ninja, then copies into the wheel's tree unless the build is in place."""

    def run(self):
        self.made = run_ninja(["cpu", "ext"] + (["cuda"] if nvcc() else [])) + [FACTS]
        if not nvcc():
            why = (
                "as PYDL_CUDA_ARCHS=none asks" if os.environ.get("PYDL_CUDA_ARCHS") else "no nvcc found, set CUDA_HOME"
            )
            print(f"pydl: libpydl_cuda.so is not built ({why})")
        if not (self.inplace or self.editable_mode):
            for path in self.made:
                target = Path(self.build_lib) / path
                self.mkpath(str(target.parent))
                self.copy_file(str(ROOT / path), str(target))

    def get_outputs(self):
        return [] if self.inplace else [str(Path(self.build_lib) / path) for path in getattr(self, "made", [])]

    def get_output_mapping(self):
        return {}


class BuildPy(build_py):
    """Installs kernels/*.py as pydl.kernels.*: one folder at the top of the checkout, no top-level module."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package == "pydl.kernels":
            modules += [(package, p.stem, str(p)) for p in sources("kernels/*.py")]
        return modules


setup(
    packages=find_packages(include=["pydl", "pydl.*"]),
    ext_modules=[] if SKIP_NATIVE else [Extension("pydl._C", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "ninja": Ninja},
    options={"build": {"build_base": "build/py"}},
)
