"""The shape of the repository: every op has its siblings, and nothing banned has crept in."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from pydl import ops

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".cpp", ".cu", ".h")
FOLDERS = ("setup.py", "pydl", "kernels", "csrc", "tests", "bench", "examples")
OPS = sorted(p.stem for p in (ROOT / "pydl" / "ops").glob("*.py") if not p.stem.startswith("_"))
LINES = 450


def tracked(*suffixes, folders=FOLDERS):
    """Files of the repository that git knows, or all of them where there is no git."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0 and done.stdout:
        files = [ROOT / name for name in done.stdout.splitlines()]
    else:
        files = [p for p in ROOT.rglob("*") if not any(part.startswith((".", "build")) for part in p.parts[1:])]
    wanted = [p for p in files if p.suffix in suffixes and p.relative_to(ROOT).parts[0] in folders]
    return sorted(p for p in wanted if p.exists())


def imports_of(path):
    """Modules that a Python file imports, relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


# siblings


def test_there_are_ops():
    assert {"layer_norm", "max_pool", "activations"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_siblings(op):
    for folder, name in (("pydl/reference", f"{op}.py"), ("tests", f"test_{op}.py"), ("bench", f"bench_{op}.py")):
        assert (ROOT / folder / name).exists(), f"{folder}/{name} is missing"
    kernels = [f"kernels/{op}.py", f"csrc/cuda/{op}.cu", f"csrc/cpu/{op}.cpp"]
    assert any((ROOT / path).exists() for path in kernels), f"none of {', '.join(kernels)} exists"


@pytest.mark.parametrize("folder", ["kernels", "csrc/cpu", "csrc/cuda", "pydl/reference", "pydl/nn", "bench"])
def test_no_sibling_is_an_orphan(folder):
    """A kernel whose op is gone, or is spelled in another way, is found here."""
    for path in (ROOT / folder).glob("*.*"):
        name = path.stem.removeprefix("bench_")
        if (
            path.suffix not in (".py", ".cpp", ".cu")
            or name.startswith("_")
            or (folder == "bench" and name == path.stem)
        ):
            continue
        assert any(name == op or name.startswith(f"{op}_") for op in OPS), f"{path.relative_to(ROOT)} belongs to no op"


@pytest.mark.parametrize("op", OPS)
def test_every_public_function_has_an_oracle_and_a_case(op):
    from pydl import reference

    found = reference.specs(op)
    module = importlib.import_module(f"pydl.ops.{op}")
    # functions that give no tensors, such as texts, have tests of their own
    graded = set(module.__all__) - set(getattr(module, "UNGRADED", ()))
    assert graded == set(found), f"pydl.ops.{op}.__all__ and pydl.reference.{op}.SPECS name other functions"
    for spec in found.values():
        cases = list(spec.cases())
        assert any(c.layouts for c in cases), f"{spec.name}: no case is tried in other layouts"
        if spec.gradient is not None:
            assert any(c.gradients for c in cases) and any(c.second for c in cases)
        assert any(a.size == 0 for c in cases for a in c.arrays), f"{spec.name}: no empty input among the cases"
        assert len({c.name for c in cases}) == len(cases), f"{spec.name}: two cases have one name"


# documentation


@pytest.mark.parametrize("name", ops.__all__)
def test_public_functions_are_documented(name):
    function = getattr(ops, name)
    text = inspect.getdoc(function) or ""
    assert text and text.split("\n\n")[0].strip(), f"{name} has no docstring"
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text, f"{name}: the docstring has no {section}"
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^\s*{parameter}\b.*:", text, re.M), f"{name}: {parameter} is not described"


@pytest.mark.parametrize("path", tracked(".py", folders=("pydl", "kernels")), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "the first statement is not a docstring"


# sizes and banned patterns


@pytest.mark.parametrize("path", tracked(*SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES, f"{len(lines)} lines"


def banned():
    """(pattern, files it is banned in, why); spelled in pieces, so that this file does not match itself."""
    python, native = (".py",), (".cpp", ".cu", ".h")
    return [
        (r"make_" + "block_ptr", python, "block pointers are gone from Triton 3.9"),
        (r"\btl\.adv" + "ance", python, "block pointers are gone from Triton 3.9"),
        (r"warp_" + "specialize", python, "not dependable across the supported versions"),
        (r"ffast-" + "math", SOURCES, "NaN and inf must come out as torch gives them"),
        (r"-march=" + "native", SOURCES, "the build must run on another machine"),
        (r"^\s*(from|import) " + r"kernels\b", python, "the top-level name belongs to another package: pydl.kernels"),
        (r"except" + r"\s*:", python, "names the exception it expects"),
        (r"cooperative_" + "groups", native, "cannot run on the host"),
        (r"__CUDA_" + r"ARCH__", native, "variants are chosen by template, so that the host runs them too"),
        (r"\b(TO" + r"DO|FIX" + r"ME|XX" + "X|HA" + r"CK)\b", SOURCES, "a plan belongs in the tracker"),
        (
            r"[\"'\s(=]/(home|root|Users|tmp|work|mnt)/",
            SOURCES,
            "an absolute path",
        ),
        (r"print\(f?\"DEB" + "UG", SOURCES, "left from debugging"),
    ]


@pytest.mark.parametrize(("pattern", "suffixes", "why"), banned(), ids=lambda v: v if isinstance(v, str) else "")
def test_banned_patterns(pattern, suffixes, why):
    found = [
        f"{path.relative_to(ROOT)}:{i}: {line.strip()}"
        for path in tracked(*suffixes)
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, why + "\n" + "\n".join(found)


OUTSIDE_COMMON = [
    (r"extern\s+__shar" + "ed__", "PYDL_DYN_SHARED of csrc/common/shared.h"),
    (r"(?<!PYDL_)\b__shar" + r"ed__\b", "PYDL_SHARED of csrc/common/shared.h"),
    (r"\ba" + r"sm\s*(volatile)?\s*\(", "a primitive with a host version in csrc/common"),
]


@pytest.mark.parametrize(("pattern", "instead"), OUTSIDE_COMMON, ids=[instead for _, instead in OUTSIDE_COMMON])
def test_what_only_csrc_common_may_do(pattern, instead):
    for path in tracked(".cu", ".cpp", ".h", folders=("csrc",)):
        if path.relative_to(ROOT).parts[1] in ("common", "simt"):
            continue
        code = re.sub(r"//.*|/\*.*?\*/", "", path.read_text(), flags=re.S if "/*" in path.read_text() else 0)
        assert not re.search(pattern, code), f"{path.relative_to(ROOT)}: use {instead}"


def test_no_float_atomics_in_kernels():
    """Sums in the order of arrival differ from run to run."""
    for path in tracked(".cu", folders=("csrc",)):
        code = re.sub(r"//.*", "", path.read_text())
        for call in re.findall(r"\batomicAdd\s*\(([^;]*)\);", code):
            assert re.search(r"\bint|unsigned|count|ticket", call), f"{path.relative_to(ROOT)}: atomicAdd({call})"
    for path in tracked(".py", folders=("kernels",)):
        assert "tl.atomic_add" not in path.read_text(), f"{path.relative_to(ROOT)}: tl.atomic_add"


# the direction of imports


@pytest.mark.parametrize("path", tracked(".py", folders=("kernels",)), ids=lambda p: p.stem)
def test_kernels_import_torch_triton_and_their_own(path):
    import sys

    for module in imports_of(path):
        top = module.split(".")[0]
        own = module.startswith(".") and module.lstrip(".").startswith("_")
        assert own or top in ("torch", "triton") or top in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", tracked(".py", folders=("pydl",)), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    parts = path.relative_to(ROOT / "pydl").parts
    modules = set(imports_of(path))
    if parts[0] == "reference":
        bad = [m for m in modules if m.split(".")[0] in ("torch", "triton") or m.startswith("pydl.ops")]
        assert not bad, f"an oracle stands alone, but imports {bad}"
        assert not any(m.startswith("pydl") and not m.startswith("pydl.reference") for m in modules)
    if parts[0] == "ops":
        above = ("pydl.nn", "pydl.functional", "pydl.accelerate", "pydl.reference", "pydl._verify")
        assert not [m for m in modules if m.startswith(above)]


def test_there_is_no_conftest_at_the_root_and_no_top_level_kernels_package():
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_functions_of_kernels_and_ops_stay_short():
    """Host functions under 60 lines, kernels under 100."""
    for path in tracked(".py", folders=("pydl", "kernels")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            jitted = any("jit" in ast.unparse(d) for d in node.decorator_list)
            body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length < (100 if jitted else 60), f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


def test_torch_s_own_tests_leave_the_process_as_it_was():
    import torch
    from _opinfo import internal

    internal("common_methods_invocations")
    assert not torch.backends.flags_frozen()
