"""CPU latency beside torch eager and onnxruntime on the same files, batch 1, one process, interleaved.

Every model is checked against torch before it is timed. Rounds alternate between the engines, so that a noisy
neighbour hits all of them; the figure is the median over all rounds, the spread the interquartile range.
Run: make bench
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers as tf
from rich.console import Console
from rich.table import Table

import venturi as vt
from benchmarks.report import save
from tests.e2e.zoo import Wrapped
from venturi.frontends.torch_export import export

ROUNDS, CALLS = 6, 5


def models() -> dict[str, tuple[Callable[[], torch.nn.Module], tuple[str, ...], Callable[[], tuple[torch.Tensor, ...]]]]:
    image = lambda: (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)  # noqa: E731
    ids = lambda: (torch.randint(3, 1000, (1, 128), generator=torch.Generator().manual_seed(0)),)  # noqa: E731
    return {
        "ResNet-50": (lambda: tf.ResNetModel(tf.ResNetConfig()), ("pixel_values",), image),
        "MobileNet-V2": (lambda: tf.MobileNetV2Model(tf.MobileNetV2Config()), ("pixel_values",), image),
        "EfficientNet-B0": (lambda: tf.EfficientNetModel(tf.EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280)), ("pixel_values",), image),
        "ConvNeXt-T": (lambda: tf.ConvNextModel(tf.ConvNextConfig()), ("pixel_values",), image),
        "ViT-B/16": (lambda: tf.ViTModel(tf.ViTConfig()), ("pixel_values",), image),
        "BERT-base-128": (lambda: tf.BertModel(tf.BertConfig()), ("input_ids",), ids),
        "GPT-2-128": (lambda: tf.GPT2Model(tf.GPT2Config(use_cache=False)), ("input_ids",), ids),
    }  # fmt: skip


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Median and interquartile range in ms of every call, in alternating rounds."""
    times: dict[str, list[float]] = {n: [] for n in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
    out = {}
    for name, t in times.items():
        q = statistics.quantiles(t, n=4)
        out[name] = (statistics.median(t), q[2] - q[0])
    return out


def main() -> None:
    import onnxruntime as ort

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    table = Table("model", "venturi ms", "bf16 ms", "eager ms", "ORT ms", "x eager", "x ORT", "bf16 x ORT", "build s", "error")
    for name, (make, names, example) in models().items():
        torch.manual_seed(0)
        module = Wrapped(make().eval(), names, ("last_hidden_state",)).eval()
        inputs = example()
        with torch.inference_mode():
            want = module(*inputs)[0]
            exported = export(module, inputs, None)
            start = time.perf_counter()
            engine = vt.build(exported)
            build_s = time.perf_counter() - start
            half = vt.build(exported, precision="bf16")
            error = float((engine(*inputs) - want).abs().max() / want.abs().max())
            assert error < 1e-3, f"{name}: error {error}"
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "m.onnx"
                ir.save(exported, path)
                session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)}
            arrays = [x.numpy() for x in inputs]
            found = measure(
                {
                    "venturi": lambda: engine(*arrays), "bf16": lambda: half(*arrays), "eager": lambda: module(*inputs),
                    "onnxruntime": lambda: session.run(None, feed),
                }
            )  # fmt: skip
        ms = {k: v[0] for k, v in found.items()}
        ratios = [ms["eager"] / ms["venturi"], ms["onnxruntime"] / ms["venturi"], ms["onnxruntime"] / ms["bf16"]]
        table.add_row(name, *(f"{found[k][0]:.1f} ± {found[k][1]:.1f}" for k in found), *(f"{r:.2f}" for r in ratios), f"{build_s:.1f}", f"{error:.0e}")
        rows.append({"model": name, "ms": ms, "iqr_ms": {k: v[1] for k, v in found.items()}, "build_s": build_s, "error": error})
        del engine, half, session
    Console(width=150).print(table)
    mean = float(np.exp(np.mean([np.log(r["ms"]["onnxruntime"] / r["ms"]["venturi"]) for r in rows])))
    print(f"geomean against onnxruntime: {mean:.2f}x")
    print(save("cpu", rows, {"onnxruntime": ort.__version__, "transformers": tf.__version__}))


if __name__ == "__main__":
    main()
