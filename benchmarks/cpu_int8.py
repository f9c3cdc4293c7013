"""Quantized models on the CPU: ours, onnxruntime and OpenVINO on the same files. `python -m benchmarks.cpu_int8`.

The files are made here: onnxruntime's static quantization of the float models (Q/DQ), bytes per tensor for activations,
int8 per channel for weights, calibrated on one random input; for "dynamic" its dynamic quantization of products. Times
say nothing of accuracy; results are compared with onnxruntime's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import venturi as vt
from benchmarks.cpu import measure
from benchmarks.cpu_models import MODELS
from benchmarks.report import save
from venturi.frontends.torch_export import export

DYNAMIC = " dynamic"
ROWS = ("ResNet-50", "MobileNet-V2", "BERT-base-128", "BERT-base-128" + DYNAMIC)


def quantize(source: Path, target: Path, feeds: dict[str, Any], products_only: bool) -> None:
    """`products_only` leaves everything but MatMul and Gemm in fp32, as is usual for transformers."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter([feeds])

        def get_next(self) -> Any:
            return next(self._left, None)

    quantize_static(
        str(source), str(target), Once(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"] if products_only else None,
    )  # fmt: skip


def run_model(name: str, batch: int) -> dict[str, Any]:
    """ms and interquartile range by engine, the correlation of our results with onnxruntime's, tactics."""
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    torch.manual_seed(0)
    make, example = MODELS[name.removesuffix(DYNAMIC)]
    module, inputs = make(), example(batch)
    arrays = [x.numpy() for x in inputs]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        whole, small = Path(folder) / "m.onnx", Path(folder) / "q.onnx"
        ir.save(export(module, inputs, None), whole)
        names = [i.name for i in ort.InferenceSession(str(whole), providers=["CPUExecutionProvider"]).get_inputs()]
        feed = dict(zip(names, arrays))
        if name.endswith(DYNAMIC):
            products = ["MatMul", "Gemm"]
            quantize_dynamic(whole, small, products, weight_type=QuantType.QInt8, per_channel=True)
        else:
            quantize(whole, small, feed, products_only=name.startswith("BERT"))
        engine = vt.build(str(small))
        session = ort.InferenceSession(str(small), providers=["CPUExecutionProvider"])
        calls: dict[str, Callable[[], Any]] = {
            "venturi": lambda: engine(*arrays), "onnxruntime": lambda: session.run(None, feed),
        }  # fmt: skip
        refused = _openvino(small, arrays, calls)
        want, got = np.asarray(session.run(None, feed)[0]), engine(*inputs)
        got = np.asarray(got[0] if isinstance(got, (list, tuple)) else got)
        agreement = float(np.corrcoef(got.ravel().astype(np.float64), want.ravel().astype(np.float64))[0, 1])
        if not agreement > 0.99:
            raise SystemExit(f"{name}: correlation {agreement} with onnxruntime; nothing is timed")
        found = measure(calls)
    ms, iqr = ({k: round(v[i], 3) for k, v in found.items()} for i in range(2))
    tactics = [s.tactic for s in engine.plan.steps]
    return {
        "model": name, "batch": batch, "ms": ms, "iqr_ms": iqr, "correlation": agreement,
        "generated_steps": round(sum(t.startswith("native-") for t in tactics) / len(tactics), 2), "refused": refused,
    }  # fmt: skip


def _openvino(path: Path, arrays: list[Any], calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """Add OpenVINO's call where it is installed and takes the model; why not otherwise."""
    try:
        import openvino as ov
    except ImportError:
        return {"openvino": "not installed"}
    core = ov.Core()
    try:
        compiled = core.compile_model(core.read_model(str(path)), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    except RuntimeError as exc:
        return {"openvino": str(exc).strip().splitlines()[-1][:200]}
    calls["openvino"] = lambda: compiled(arrays)
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(ROWS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--no-save", action="store_true", help="do not write benchmarks/results")
    args = parser.parse_args()
    rows = []
    for name in args.models.split(","):
        rows.append(run_model(name, args.batch))
        print(rows[-1], flush=True)
    for peer in ("onnxruntime", "openvino"):
        found = [r["ms"]["venturi"] / r["ms"][peer] for r in rows if peer in r["ms"]]
        if found:
            print(f"geometric mean of venturi / {peer}: {statistics.geometric_mean(found):.3f} of {len(found)}")
    if not args.no_save:
        save("cpu-int8", rows)


if __name__ == "__main__":
    main()
