"""The command line as a user runs it: every command once, its JSON, its help, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def venturi(*args: str, cwd: Path, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "venturi", *args], cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
        env=None,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout if expect == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "m.onnx").write_bytes((ROOT / "examples/digits/digits.onnx").read_bytes())
    venturi("build", "m.onnx", "--opt-level", "0", "--refit", cwd=path)
    return path


JSON_COMMANDS: dict[str, list[str]] = {
    "build": ["build", "m.onnx", "-o", "n.vt", "--opt-level", "1", "--json"],
    "build-profile": [
        "build",
        "m.onnx",
        "-o",
        "p.vt",
        "--opt-level",
        "0",
        "--min-shapes",
        "image:1x1x8x8",
        "--max-shapes",
        "image:4x1x8x8",
        "--json",
    ],
    "bench": ["bench", "m.vt", "--duration", "0.1", "--warm-up", "10", "--profile", "--json"],
    "bench-streams": ["bench", "m.vt", "--duration", "0.1", "--warm-up", "10", "--streams", "auto", "--json"],
    "bench-onnx": [
        "bench",
        "m.onnx",
        "--duration",
        "0.1",
        "--warm-up",
        "10",
        "--opt-level",
        "0",
        "--shapes",
        "image:3x1x8x8",
        "--json",
    ],
    "run": [
        "run",
        "m.onnx",
        "--backends",
        "venturi,reference",
        "--save-inputs",
        "in.npz",
        "--save-outputs",
        "out.npz",
        "--json",
    ],
    "inspect": ["inspect", "m.vt", "--json"],
    "inspect-model": ["inspect", "m.onnx", "--json"],
    "plan": ["inspect", "plan", "m.vt", "--json"],
    "capability": ["inspect", "capability", "--json"],
    "check": ["check", "m.onnx", "--json"],
    "devices": ["devices", "--json"],
    "knobs": ["knobs", "--json"],
    "sanitize": ["surgeon", "sanitize", "m.onnx", "-o", "c.onnx", "--json"],
    "extract": ["surgeon", "extract", "m.onnx", "-o", "e.onnx", "--outputs", "relu", "--json"],
    "insert": ["surgeon", "insert", "m.onnx", "-o", "i.onnx", "--op", "Sigmoid", "--at", "logits", "--json"],
    "prune": ["surgeon", "prune", "m.onnx", "-o", "s.onnx", "--json"],
    "weight-strip": ["surgeon", "weight-strip", "m.onnx", "-o", "thin.onnx", "--json"],
    "bisect": ["debug", "bisect", "m.onnx", "--json"],
    "precision": ["debug", "precision", "m.onnx", "--json"],
    "repeat": ["debug", "repeat", "m.onnx", "--times", "2", "--json"],
}


@pytest.mark.parametrize("name", JSON_COMMANDS)
def test_json(name: str, folder: Path) -> None:
    data: Any = json.loads(venturi(*JSON_COMMANDS[name], cwd=folder))
    facts = {
        "bench": lambda d: (
            d["runs"] >= 10 and d["min_ms"] <= d["median_ms"] <= d["max_ms"] and len(d["profile"]["layers"]) > 0
        ),
        "bench-streams": lambda d: d["streams"] >= 1 and d["runs"] >= 10,
        "bench-onnx": lambda d: d["shapes"] == {"image": [3, 1, 8, 8]} and d["read_ms"] > 0 and d["compile_ms"] > 0,
        "run": lambda d: (
            d["passed"] and (folder / "in.npz").exists() and np.load(folder / "out.npz")["logits"].shape == (1, 10)
        ),
        "check": lambda d: d["passed"],
        "capability": lambda d: len(d) > 240,
        "bisect": lambda d: d is None,
        "repeat": lambda d: d["identical"],
        "prune": lambda d: d["tensors_pruned"] == 3,
        "knobs": lambda d: any(k["name"] == "VENTURI_VERIFY" for k in d),
    }
    assert facts.get(name, bool)(data) if name != "bisect" else data is None


def test_files_for_people(folder: Path) -> None:
    venturi("inspect", "engine", "m.vt", "--html", "r.html", "--onnx", "a.onnx", cwd=folder)
    page = (folder / "r.html").read_text()
    assert "<script" not in page
    assert "layers" in page
    import onnx

    annotated = onnx.load(folder / "a.onnx", load_external_data=False)
    assert any(p.key == "venturi.tactic" for n in annotated.graph.node for p in n.metadata_props)


def test_strip_and_reconstruct_round_trip(folder: Path) -> None:
    venturi("surgeon", "weight-strip", "m.onnx", "-o", "t.onnx", cwd=folder)
    assert (folder / "t.onnx").stat().st_size < 60_000
    venturi("surgeon", "weight-reconstruct", "t.onnx", "-o", "w.onnx", cwd=folder)
    venturi("run", "w.onnx", "--backends", "venturi,reference", cwd=folder)


def test_reduce_finds_the_node(folder: Path) -> None:
    """The check fails when the candidate holds a MaxPool; what is left is that node alone."""
    script = "import sys, onnx; sys.exit(any(n.op_type == 'MaxPool' for n in onnx.load(sys.argv[1]).graph.node))"
    (folder / "check.py").write_text(script)
    out = venturi(
        "debug",
        "reduce",
        "m.onnx",
        "-o",
        "small.onnx",
        "--check",
        f"{sys.executable} check.py {{}}",
        "--json",
        cwd=folder,
    )
    assert [n.split()[0] for n in json.loads(out)["nodes"]] == ["MaxPool"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["build", "absent.onnx"], "no file 'absent.onnx'"),
        (["build", "m.onnx", "--opt-level", "9"], "opt_level"),
        (["build", "m.onnx", "--precision", "fp17"], "precision"),
        (["build", "m.onnx", "--device", "cuda"], "CUDA"),
        (["bench", "m.vt", "--shapes", "img:1x1x8x8"], "no input 'img'"),
        (["bench", "m.vt", "--shapes", "image:1xtwo"], "expected NAME:1x3x224x224"),
        (["bench", "m.vt", "--streams", "0"], "streams must be a number from 1 on"),
        (["bench", "m.vt", "--streams", "some"], "streams must be a number from 1 on"),
        (["bench", "m.vt", "--intra-threads", "-2"], "intra_threads must be a number from 1 on"),
        (["run", "m.onnx", "--backends", "venturi,tensorflow"], "no backend 'tensorflow'"),
        (["inspect", "engine", "m.onnx"], "no engine file"),
        (["surgeon", "extract", "m.onnx", "-o", "x.onnx", "--outputs", "rely"], "Did you mean"),
        (["debug", "reduce", "m.onnx", "-o", "x.onnx", "--check", "true"], "nothing to reduce"),
    ],
)
def test_errors(args: list[str], words: str, folder: Path) -> None:
    text = venturi(*args, cwd=folder, expect=1)
    assert words in " ".join(text.split())
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "command",
    ["build", "bench", "run", "check", "demo", "devices", "knobs", "inspect model", "inspect engine", "inspect plan", "inspect capability",
     "surgeon sanitize", "surgeon extract", "surgeon insert", "surgeon prune", "surgeon weight-strip", "surgeon weight-reconstruct",
     "debug reduce", "debug bisect", "debug precision", "debug repeat"],
)  # fmt: skip
def test_help_shows_an_example(command: str, folder: Path) -> None:
    assert "Example:" in venturi(*command.split(), "--help", cwd=folder)


def test_brackets_in_names_are_printed_as_they_are(tmp_path: Path) -> None:
    import onnx_ir as ir

    import venturi as vt

    net = vt.Network("names")
    x = net.input("x", (2, 3))
    y = net.op("Cos", x, name="[/red] [bold]layer[/]")
    net.output("y", net.op("CumSum", y, np.array(0, np.int64), name="a[/b]"))
    ir.save(net.to_model(), tmp_path / "m.onnx")
    for args in (["build", "m.onnx"], ["inspect", "model", "m.onnx"], ["check", "m.onnx"]):
        venturi(*args, cwd=tmp_path)
    for args in (["inspect", "engine", "m.vt"], ["inspect", "plan", "m.vt"]):
        assert "[/red] [bold]" in venturi(*args, cwd=tmp_path)
    assert "[/red] [bold]" in str(vt.load(tmp_path / "m.vt").inspect())


def test_sanitized_models_name_an_opset_that_older_runtimes_know(folder: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    venturi("surgeon", "sanitize", "m.onnx", "-o", "sane.onnx", cwd=folder)
    image = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)
    (want,) = onnxruntime.InferenceSession(str(folder / "m.onnx")).run(None, {"image": image})
    (got,) = onnxruntime.InferenceSession(str(folder / "sane.onnx")).run(None, {"image": image})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
