"""`venturi demo`: two models through the whole path, checked and measured."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, progress_bar, table

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits" / "digits.onnx"


@dataclass
class Row:
    """Figures of one model. Times in ms, memory in MB; `speedup` is over torch eager on the same machine."""

    model: str
    build_s: float
    load_ms: float
    median_ms: float
    p99_ms: float
    throughput: float
    peak_mb: float
    speedup: float
    max_error: float


def demo(
    duration: Annotated[float, typer.Option(help="Seconds to measure each model.")] = 3.0,
    precision: Annotated[str, typer.Option(help="model, fp32, tf32, fp16 or bf16.")] = "model",
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Build a digits CNN and a ResNet-50, check them against the reference, show accuracy and speed."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    if DIGITS.exists():
        row, accuracy = _digits(duration, precision, quiet=as_json)
        rows.append(row)
        facts["digits_accuracy_percent"] = accuracy
    else:
        facts["digits"] = "skipped: examples/digits/digits.onnx is in the repository, not in the installed package"
    rows.append(_resnet(duration, precision, quiet=as_json))
    if as_json:
        emit_json({"models": [vars(r) for r in rows], **facts})
        return
    columns = [
        "model",
        "build s",
        "load ms",
        "median ms",
        "p99 ms",
        "runs/s",
        "peak MB",
        "x torch eager",
        "max error",
    ]
    console.print(table("venturi on this CPU, batch 1", columns, [list(vars(r).values()) for r in rows]))
    for name, value in facts.items():
        console.print(f"{name.replace('_', ' ')}: {value}", highlight=False)


def _digits(duration: float, precision: str, quiet: bool) -> tuple[Row, float]:
    """The committed CNN on scikit-learn's digits; accuracy over the held-out fifth."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = order[int(0.8 * len(labels)) :]
    x = (images[held_out] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    engine, row = _measure(
        "digits CNN", str(DIGITS), {"image": x[:1]}, duration, precision, quiet, _interpreted(DIGITS)
    )
    accuracy = 100.0 * float((engine(x).argmax(1) == labels[held_out]).mean())
    return row, round(accuracy, 2)


def _interpreted(path: Path) -> Callable[[dict[str, Any]], Any]:
    """The model's operators one by one in eager torch."""
    from venturi.backends.reference.interpreter import Interpreter
    from venturi.frontends.onnx_import import import_onnx

    return Interpreter(import_onnx(path).graph).run


def _resnet(duration: float, precision: str, quiet: bool) -> Row:
    import numpy as np
    import torch

    import venturi as vt
    from venturi.cli.resnet import NetworkOps, Recorded, TorchOps, Weights, resnet50

    net = vt.Network("resnet50")
    x = net.input("image", (1, 3, 224, 224))
    net.output("logits", resnet50(NetworkOps(net), x, Weights()))
    recorded = Recorded()

    def eager(inputs: dict[str, Any]) -> Any:
        recorded.rewind()
        with torch.inference_mode():
            return resnet50(TorchOps(), torch.from_numpy(inputs["image"]), recorded)

    image = np.random.default_rng(1).standard_normal((1, 3, 224, 224)).astype(np.float32)
    return _measure("ResNet-50", net.to_model(), {"image": image}, duration, precision, quiet, eager)[1]


def _measure(
    name: str,
    source: Any,
    inputs: dict[str, Any],
    duration: float,
    precision: str,
    quiet: bool,
    eager: Callable[[dict[str, Any]], Any],
) -> tuple[Any, Row]:
    """Build, save, reload, check against the reference (and onnxruntime when installed), time."""
    import venturi as vt
    from venturi.engine.benchmarking import measure

    start = time.perf_counter()
    with progress_bar(not quiet) as progress:
        built = vt.build(source, precision=precision, progress=progress)
    build_s = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.vt"
        built.save(path)
        start = time.perf_counter()
        engine = vt.load(path)
        load_ms = (time.perf_counter() - start) * 1e3
        error = _check(name, source, engine, inputs, precision)
        result = measure(lambda: engine.run(inputs), duration_s=duration)
        base = measure(lambda: eager(inputs), duration_s=duration)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return engine, Row(
        name, build_s, load_ms, result.median_ms, result.percentiles_ms[99], result.throughput_qps, peak,
        base.median_ms / result.median_ms, error,
    )  # fmt: skip


def _check(name: str, source: Any, engine: Any, inputs: dict[str, Any], precision: str) -> float:
    """Largest error over the output's magnitude; raises InternalError when it is beyond the precision's bound."""
    import numpy as np

    from venturi.backends.reference.interpreter import Interpreter
    from venturi.core.errors import InternalError
    from venturi.frontends.sources import import_model

    model = import_model(source)
    want = Interpreter(model.graph).run(inputs)
    got = engine.run(inputs)
    references = {"the reference interpreter": want}
    try:
        import onnxruntime as ort
    except ImportError:
        pass
    else:
        import onnx_ir as ir

        session = ort.InferenceSession(_for_onnxruntime(ir.to_proto(model)), providers=["CPUExecutionProvider"])
        references["onnxruntime"] = dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs)))
    bound = {"bf16": 0.05, "fp16": 0.01, "tf32": 0.01}.get(precision, 1e-4)
    worst = 0.0
    for who, expected in references.items():
        for output, y in expected.items():
            error = float(np.abs(got[output] - y).max() / np.abs(y).max())
            if not error <= bound:
                raise InternalError(f"{name}: output {output!r} is off by {error:.2g} from {who} (bound {bound})")
            worst = max(worst, error)
    return worst


def _for_onnxruntime(proto: Any) -> bytes:
    """onnxruntime knows opsets up to 26; these models use nothing newer."""
    for opset in proto.opset_import:
        if opset.domain == "" and opset.version > 24:
            opset.version = 24
    proto.ir_version = min(proto.ir_version, 11)
    data: bytes = proto.SerializeToString()
    return data
