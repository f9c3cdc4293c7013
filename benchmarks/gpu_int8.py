"""ResNet-50 in bytes on a GPU. `python -m benchmarks.gpu_int8 make FILE --batch 128`, then `run FILE` where the GPU is.

The file is onnxruntime's static quantization (Q/DQ, signed bytes, symmetric, int8 weights a channel, calibrated on one
random input) of the network that benchmarks/gpu.py measures. `--placement inputs` puts pairs where TensorRT's guide
wants them: on what convolutions, products and poolings read and on one side of each addition, so that convolution,
addition and activation round once. `all` is onnxruntime's default, three roundings there. Peer: torch.compile of that network in fp16, same run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import venturi as vt
from benchmarks.gpu import compiled_ms, describe_steps, host_us, median_ms
from benchmarks.gpu_models import example, make


def make_file(target: Path, batch: int, everywhere: bool) -> None:
    """Quantize for one image, then say that there are `batch`."""
    import onnx
    import onnx_ir as ir
    from onnx import numpy_helper
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from venturi.frontends.torch_export import export

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter([{"input": example("resnet50", 1).float().numpy()}])

        def get_next(self) -> Any:
            return next(self._left, None)

    whole = target.with_suffix(".fp32.onnx")
    with torch.no_grad():
        ir.save(export(make("resnet50").float(), (example("resnet50", 1).float(),), None), whole)
    options: dict[str, Any] = {"ActivationSymmetric": True}
    if not everywhere:
        options["OpTypesToExcludeOutputQuantization"] = ["Conv", "Gemm", "Add"]
    quantize_static(
        str(whole), str(target), Once(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8, per_channel=True, extra_options=options,
        op_types_to_quantize=None if everywhere else ["Conv", "Gemm", "Add", "MaxPool"],
    )  # fmt: skip
    whole.unlink()
    model = onnx.load(target)
    if not everywhere:
        _one_side(model)
    shapes = {n.input[1] for n in model.graph.node if n.op_type == "Reshape"}
    for tensor in model.graph.initializer:
        if tensor.name in shapes:
            free = np.concatenate([[-1], numpy_helper.to_array(tensor)[1:]]).astype(np.int64)
            tensor.CopyFrom(numpy_helper.from_array(free, tensor.name))
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, target)


def _one_side(model: Any) -> None:
    """Additions read a convolution's result as it is, on their first side where both come from one."""
    made = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.op_type != "Add":
            continue
        for i, name in enumerate(node.input):
            before = made[made[made[name].input[0]].input[0]]
            if before.op_type == "Conv":
                node.input[i] = before.output[0]
                break


def run(path: Path, level: int, peer: bool, out: Path | None) -> dict[str, Any]:
    """Median ms, the correlation of the results with the dequantized network's, and the peer's ms."""
    start = time.perf_counter()
    engine = vt.build(str(path), device="cuda", opt_level=level)
    build_s = time.perf_counter() - start
    batch = int(engine.inputs[0].shape[0])
    x = example("resnet50", batch).float().cuda()
    got = engine(x).float()
    ms, spread = median_ms(lambda: engine(x))
    ops = sum(s.flops for s in engine.plan.steps)
    row: dict[str, Any] = {
        "model": "resnet50-int8", "batch": batch, "build_s": round(build_s, 1), "steps": len(engine.plan.steps),
        "venturi_ms": round(ms, 4), "spread_ms": round(spread, 4), "host_us": round(host_us(lambda: engine(x)), 1),
        "tera_ops": round(ops / ms / 1e9, 1), "images_s": round(batch / ms * 1e3),
    }  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        model = make("resnet50").float().cuda()
        want = model(x)
        row["correlation_with_fp32"] = float(np.corrcoef(got.cpu().ravel(), want.cpu().ravel())[0, 1])
        if peer:
            row |= compiled_ms(model.half(), x.half())
            row["speedup"] = round(row["compile_ms"] / row["venturi_ms"], 3)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report = engine.profile({engine.inputs[0].name: x}, runs=5)
        (out / f"resnet50_int8_b{batch}.txt").write_text(describe_steps(engine) + "\n" + str(report))
        (out / f"int8_b{batch}.json").write_text(json.dumps(row, indent=1))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["make", "run"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--placement", choices=["inputs", "all"], default="inputs")
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.action == "make":
        make_file(args.file, args.batch, args.placement == "all")
    else:
        print(json.dumps(run(args.file, args.level, not args.no_peer, args.out)), flush=True)


if __name__ == "__main__":
    main()
