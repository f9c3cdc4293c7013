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


def models() -> dict[
    str, tuple[Callable[[], torch.nn.Module], tuple[str, ...], Callable[[], tuple[torch.Tensor, ...]]]
]:
    image = lambda: (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)  # noqa: E731
    ids = lambda: (torch.randint(3, 1000, (1, 128), generator=torch.Generator().manual_seed(0)),)  # noqa: E731
    return {
        "ResNet-50": (lambda: tf.ResNetModel(tf.ResNetConfig()), ("pixel_values",), image),
        "MobileNet-V2": (lambda: tf.MobileNetV2Model(tf.MobileNetV2Config()), ("pixel_values",), image),
        "Swin-T": (lambda: tf.SwinModel(tf.SwinConfig()), ("pixel_values",), image),
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


def run_model(name: str, make: Callable[[], torch.nn.Module], names: tuple[str, ...], example: Any) -> dict[str, Any]:
    """Figures of one model: ms and interquartile range by engine, build seconds, error against torch."""
    import onnxruntime as ort

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
        if not error < 1e-3:
            raise SystemExit(f"{name}: error {error} against torch; nothing is timed")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            ir.save(exported, path)
            session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)}
        arrays = [x.numpy() for x in inputs]
        found = measure(
            {
                "venturi": lambda: engine(*arrays),
                "venturi-bf16": lambda: half(*arrays),
                "eager": lambda: module(*inputs),
                "onnxruntime": lambda: session.run(None, feed),
            }
        )
    ms, iqr = ({k: round(v[i], 3) for k, v in found.items()} for i in range(2))
    return {"model": name, "ms": ms, "iqr_ms": iqr, "build_s": round(build_s, 2), "error": error}


def main() -> None:
    import onnxruntime as ort

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = [run_model(name, *parts) for name, parts in models().items()]
    table = Table("model", "venturi ms", "bf16 ms", "eager ms", "ORT ms", "x eager", "x ORT", "bf16 x ORT", "build s")
    for r in rows:
        ms = r["ms"]
        ratios = [
            ms["eager"] / ms["venturi"],
            ms["onnxruntime"] / ms["venturi"],
            ms["onnxruntime"] / ms["venturi-bf16"],
        ]
        figures = [f"{ms[k]:.1f} ± {r['iqr_ms'][k]:.1f}" for k in ms]
        table.add_row(r["model"], *figures, *(f"{x:.2f}" for x in ratios), str(r["build_s"]))
    Console(width=150).print(table)
    for peer in ("eager", "onnxruntime"):
        mean = float(np.exp(np.mean([np.log(r["ms"][peer] / r["ms"]["venturi"]) for r in rows])))
        print(f"geomean against {peer}: {mean:.2f}x")
    print(save("cpu", rows, {"onnxruntime": ort.__version__, "transformers": tf.__version__}))


if __name__ == "__main__":
    main()
