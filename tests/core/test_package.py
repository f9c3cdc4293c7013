"""The package as a user meets it: public names, import cost, layering, file sizes, collected tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import venturi as vt

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "venturi"
LAYERS = {
    "core": 0, "ir": 1, "ops": 2, "kernels": 2, "frontends": 3, "passes": 3, "quant": 3, "backends": 3, "tuning": 4,
    "engine": 4, "runtime": 4, "plugins": 4, "api": 5, "pytorch": 5, "vision": 5, "llm": 5, "serve": 6, "cli": 6,
}  # fmt: skip
# Within L3, imports point from frontends and passes to the backends' reference, never back.
FORBIDDEN = {
    "runtime": {"passes", "frontends"},
    "backends": {"passes", "frontends"},
    "ir": {"torch"},
    "core": {"torch", "onnx", "onnx_ir", "numpy"},
}
FORBIDDEN_MODULES = {"runtime": {"venturi.engine.builder", "venturi.engine.engine"}}


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def test_public_names_are_pinned() -> None:
    assert sorted(vt.__all__) == [
        "Batching", "BuildConfig", "CudaGraphConfig", "DeviceError", "Engine", "EngineError",
        "GuidedDecodingParams", "InternalError", "KvCacheConfig", "LLM", "ModelError", "Network", "Profile",
        "RequestError", "SamplingParams", "SchedulerConfig", "ShapeError", "TensorSpec", "TuningError",
        "VenturiError", "__version__", "build", "load", "tune",
    ]  # fmt: skip
    for name in vt.__all__:
        assert getattr(vt, name) is not None


def test_import_is_light() -> None:
    code = "import sys, venturi; print(sorted(m for m in ('torch', 'onnx', 'numpy', 'pydantic') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_layers() -> None:
    wrong = []
    for path in _sources():
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own not in LAYERS:
            continue
        for module, line in _imports(path):
            place = f"{path.relative_to(ROOT)}:{line} imports {module}"
            top = module.split(".")[0]
            if top in FORBIDDEN.get(own, set()):
                wrong.append(place)
            if module in FORBIDDEN_MODULES.get(own, set()):
                wrong.append(place)
            if top != "venturi" or module == "venturi":
                continue
            other = module.split(".")[1]
            if LAYERS.get(other, 0) > LAYERS[own] or other in FORBIDDEN.get(own, set()):
                wrong.append(place)
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_command_line() -> None:
    users = [p for p in _sources() if "cli" not in p.parts and p.name != "__main__.py" for m, _ in _imports(p) if m.startswith("venturi.cli")]  # fmt: skip
    assert not users


def test_files_are_small() -> None:
    long = {str(p.relative_to(ROOT)): n for p in _sources() if (n := len(p.read_text().splitlines())) > 600}
    assert not long


def test_functions_are_short() -> None:
    long = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                if node.end_lineno - node.lineno + 1 > 90:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long


def test_every_file_says_what_it_is() -> None:
    silent = [p for p in _sources() if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent


def test_every_test_file_collects() -> None:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        assert any(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in ast.walk(tree)), path


@pytest.mark.parametrize("names", [("utils", "util", "helpers", "helper", "misc", "common")])
def test_no_empty_names(names: tuple[str, ...]) -> None:
    assert not [p for p in _sources() if p.stem in names]
