"""Decode latency: time per token of a whole engine step at fixed batch and context, random weights.

    python -m benchmarks.llm.decode --model llama-8b --batches 1,32 --quants none,fp8 --out results.json

Time per token is the median gap between tokens as the engine hands them out. The floor is the time to read the linear
weights and the cache once at the measured bandwidth of the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.llm.shapes import folder_of, linear_parameters
from venturi import LLM, KvCacheConfig, SamplingParams, SchedulerConfig

BANDWIDTH = 4.35e12  # bytes/s read, measured on the H200


def measure(llm: LLM, batch: int, context: int, tokens: int) -> dict[str, float]:
    vocab = llm.loaded.model.spec.vocab_size
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [torch.randint(10, vocab - 10, (context,)).tolist() for _ in range(batch)]
    start = time.monotonic()
    outputs = [llm.generate_async(p, params) for p in prompts]
    for output in outputs:
        output.result()
    wall = time.monotonic() - start
    last = outputs[-1].token_times
    gaps = [1e3 * (b - a) for a, b in pairwise(last)][tokens // 4 :]
    quartiles = statistics.quantiles(gaps, n=4)
    first = min(o.token_times[0] for o in outputs) - start
    return {
        "ms_per_token": statistics.median(gaps),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "first_token_ms": 1e3 * first,
        "wall_s": wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--quants", default="none,fp8")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for quant in args.quants.split(","):
        started = time.monotonic()
        llm = LLM(
            folder_of(args.model), load_format="dummy", skip_tokenizer_init=True, quant=None if quant == "none" else quant,
            max_seq_len=args.context + args.tokens + 64, kv_cache=KvCacheConfig(max_tokens=64 * (args.context + 512), dtype=args.kv),
            scheduler=SchedulerConfig(max_batch_size=64),
        )  # fmt: skip
        load = time.monotonic() - started
        print(llm.memory_plan, flush=True)
        for batch in map(int, args.batches.split(",")):
            began = time.monotonic()
            measure(llm, batch, args.context, 8)
            warm = time.monotonic() - began
            result = measure(llm, batch, args.context, args.tokens)
            weight = linear_parameters(args.model) * (1 if quant == "fp8" else 2)
            spec = llm.loaded.model.spec.layers[0].attention
            cache = batch * args.context * len(llm.loaded.model.spec.layers) * 2 * spec.num_kv_heads * spec.head_dim
            cache *= 1 if args.kv == "fp8" else 2
            floor = 1e3 * (weight + cache) / BANDWIDTH
            row = {
                "model": args.model,
                "quant": quant,
                "kv": args.kv,
                "batch": batch,
                "context": args.context,
                **result,
                "floor_ms": floor,
                "percent_of_floor": 100 * floor / result["ms_per_token"],
                "load_s": load,
                "first_use_s": warm,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        print(llm.explain(), flush=True)
        tuner = getattr(getattr(llm.runner, "_graphs", None), "_tuner", None)
        if tuner is not None:
            for key, times in tuner.times_us.items():
                print(
                    key,
                    {
                        k.replace("LinearConfig", ""): round(v, 1)
                        for k, v in sorted(times.items(), key=lambda kv: kv[1])
                    },
                    flush=True,
                )
        llm.shutdown()
        del llm
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if args.out:
        where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor()
        args.out.write_text(json.dumps({"device": where, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
