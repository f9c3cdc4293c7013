"""Times the LLM kernels alone, in graphs with cold weights and caches: attention, norms, rotary, sampling.

python -m benchmarks.llm.kernels --out kernels.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch

from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.triton_kernels import norms, quantize, rotary, sampling
from venturi.kernels.triton_kernels.attention_parts import TileConfig
from venturi.kernels.triton_kernels.decode import decode
from venturi.kernels.triton_kernels.prefill import prefill, tiles

BANDWIDTH = 4.35e12
KIND = AttentionKind(128**-0.5)


def time_us(work: Callable[[int], object], copies: int) -> float:
    """Median over replays of a graph that runs work(0..copies-1), per call."""
    for i in range(copies):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            work(i)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(9):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return sorted(times)[4]


def batch_of(counts: list[int], lengths: list[int], size: int, rows: int) -> AttentionBatch:
    wide = -(-max(lengths) // size)
    tables = torch.randperm(len(counts) * wide).view(len(counts), wide).int().cuda()
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device="cuda")  # noqa: E731
    batch = AttentionBatch(
        ints(starts), ints(lengths), tables, ints(range(len(counts))), ints([]), ints([]), max(counts), max(lengths)
    )
    sequences, offsets = tiles(starts, rows)
    batch.workspace.update(tile_seq=ints(sequences), tile_start=ints(offsets))
    return batch


def decode_rows(batch_size: int, context: int, dtype: torch.dtype) -> list[dict]:
    size, heads, kv = 32, 32, 8
    blocks = batch_size * -(-context // size)
    copies = max(2, min(16, int(3e8 / (blocks * size * kv * 128 * 2 * dtype.itemsize)) + 1))
    caches = [[torch.randn(blocks, size, kv, 128, device="cuda").to(dtype) for _ in range(2)] for _ in range(copies)]
    batch = batch_of([1] * batch_size, [context] * batch_size, size, 128)
    q = torch.randn(batch_size, heads, 128, device="cuda", dtype=torch.bfloat16)
    floor = batch_size * context * kv * 128 * 2 * dtype.itemsize / BANDWIDTH * 1e6
    found = []
    for splits, keys, warps, stages in itertools.product((1, 2, 4, 8, 16, 32), (32, 64, 128), (4, 8), (2, 3, 4)):
        if (
            splits * keys > 2 * context
            or (splits > 4 and batch_size >= 32)
            or (splits < 4 and batch_size == 1)
            or (stages == 4 and keys == 128)
        ):
            continue
        config = TileConfig(keys=keys, warps=warps, stages=stages)
        try:
            us = time_us(lambda i: decode(q, *caches[i], batch, KIND, None, splits, config), copies)  # noqa: B023
        except Exception as exc:
            print("decode fails", splits, config, str(exc)[:100], flush=True)
            continue
        found.append(
            {
                "kernel": "decode",
                "batch": batch_size,
                "context": context,
                "dtype": str(dtype),
                "splits": splits,
                "keys": keys,
                "warps": warps,
                "stages": stages,
                "us": us,
                "percent": 100 * floor / us,
            }
        )
    return sorted(found, key=lambda r: r["us"])


def prefill_rows(context: int) -> list[dict]:
    size, heads, kv = 32, 32, 8
    q = torch.randn(context, heads, 128, device="cuda", dtype=torch.bfloat16)
    caches = [torch.randn(context // size, size, kv, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    flops = 2 * context * context * heads * 128
    found = []
    for queries, keys, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3)):
        if keys == 128 and stages > 2:
            continue
        config = TileConfig(keys, queries, warps, stages)
        batch = batch_of([context], [context], size, queries)
        try:
            us = time_us(lambda i: prefill(q, *caches, batch, KIND, None, config), 2)  # noqa: B023
        except Exception as exc:
            print("prefill fails", config, str(exc)[:100], flush=True)
            continue
        found.append(
            {
                "kernel": "prefill",
                "context": context,
                "queries": queries,
                "keys": keys,
                "warps": warps,
                "stages": stages,
                "us": us,
                "tflops": flops / us / 1e6,
            }
        )
    return sorted(found, key=lambda r: r["us"])


def small_rows() -> list[dict]:
    found = []
    for rows in (1, 32, 2048):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        qkv = torch.randn(rows, 6144, device="cuda", dtype=torch.bfloat16)
        weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
        angles, places = torch.randn(4096, 128, device="cuda"), torch.arange(rows, device="cuda")
        caches = [torch.zeros(100, 32, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        q, k, v = (t.view(rows, -1, 128) for t in qkv.split([4096, 1024, 1024], 1))
        logits = torch.randn(rows if rows < 1000 else 256, 128256, device="cuda")
        n = len(logits)
        one, zero = torch.ones(n, device="cuda"), torch.zeros(n, device="cuda")
        whole = torch.zeros(n, dtype=torch.int64, device="cuda")
        cases = {
            "rms_norm": lambda i: norms.rms_norm(x, weight, 1e-5, None, 0.0),  # noqa: B023
            "rms_norm residual": lambda i: norms.rms_norm(x, weight, 1e-5, x, 0.0),  # noqa: B023
            "rms_norm fp8": lambda i: norms.rms_norm_fp8(x, weight, 1e-5, 0.0),  # noqa: B023
            "quantize": lambda i: quantize.quantize_rows(x),  # noqa: B023
            "rotary+write": lambda i: rotary.rotate_and_write(q, k, v, angles, places, *caches, places, False),  # noqa: B023
            "argmax": lambda i: logits.argmax(-1),  # noqa: B023
            "sample plain": lambda i: sampling.sample(logits, one, whole, one, zero, whole, whole),  # noqa: B023
            "sample top-k top-p": lambda i: sampling.sample(logits, one, whole + 50, 0.9 * one, zero, whole, whole),  # noqa: B023
        }
        found += [{"kernel": name, "rows": rows, "us": time_us(work, 4)} for name, work in cases.items()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="small,decode,prefill")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = small_rows() if "small" in args.parts else []
    for row in rows:
        print(row, flush=True)
    half, eighth = torch.bfloat16, torch.float8_e4m3fn
    for batch, context, dtype in ((1, 1024, half), (32, 1024, half), (64, 4096, half), (64, 4096, eighth)):
        if "decode" not in args.parts:
            continue
        found = decode_rows(batch, context, dtype)
        rows += found
        for row in found[:4]:
            print({k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    for row in (found := prefill_rows(8192) if "prefill" in args.parts else [])[:4]:
        print(row, flush=True)
    rows += found
    if args.out:
        args.out.write_text(
            json.dumps({"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
