"""Every code block of README and docs runs; generated pages are up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SLOW = ("make ", "pip install", "git clone")


def _blocks(page: Path, kind: str) -> list[str]:
    return [text for k, text in _BLOCK.findall(page.read_text()) if k == kind]


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page run in order in one interpreter, with the digits model as model.onnx."""
    (tmp_path / "model.onnx").write_bytes((ROOT / "examples/digits/digits.onnx").read_bytes())
    script = "\n".join(_blocks(page, "python"))
    (tmp_path / "page.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p, "sh")], ids=lambda p: p.name)
def test_shell_blocks_run(page: Path, tmp_path: Path) -> None:
    """Line by line, `venturi` being this interpreter's; what installs or takes minutes is run by CI itself."""
    os.symlink(ROOT / "examples", tmp_path / "examples")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ran = 0
    for line in "\n".join(_blocks(page, "sh")).splitlines():
        command = line.split("#")[0].strip()
        if not command or command.startswith(_SLOW):
            continue
        command = re.sub(r"^venturi\b", f"{sys.executable} -m venturi", command)
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        ran += 1
    assert ran or all(line.startswith(_SLOW) or not line for b in _blocks(page, "sh") for line in b.splitlines())


def test_generated_pages_are_current() -> None:
    from docs.generate import environment, operators

    assert (ROOT / "docs/operators.md").read_text() == operators(), "run make docs"
    assert (ROOT / "docs/env.md").read_text() == environment(), "run make docs"


def test_relative_links_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
