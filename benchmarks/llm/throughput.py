"""Offline throughput: output tokens per second at fixed input and output lengths, random weights, infinite rate.

    python -m benchmarks.llm.throughput --cells 128/128/4000,1000/1000/1000 --quant fp8 --kv fp8

TensorRT-LLM's published figures for one H200 and Llama-3.1-8B in FP8 stand beside ours.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.llm.shapes import folder_of
from venturi import LLM, CudaGraphConfig, KvCacheConfig, SamplingParams, SchedulerConfig

TENSORRT_LLM = {
    "128/128": 27911,
    "128/2048": 26221,
    "1000/1000": 17744,
    "2048/128": 3538,
    "5000/500": 3902,
    "20000/2000": 1804,
}


def measure(llm: LLM, isl: int, osl: int, count: int) -> dict:
    vocab = llm.loaded.model.spec.vocab_size
    prompts = torch.randint(10, vocab - 10, (count, isl)).tolist()
    params = SamplingParams(temperature=0, max_tokens=osl, ignore_eos=True)
    before, start = llm.stats(), time.monotonic()
    outputs = llm.generate(prompts, params)
    wall = time.monotonic() - start
    assert all(len(o.outputs[0].token_ids) == osl for o in outputs)
    rate = count * osl / wall
    peer = TENSORRT_LLM.get(f"{isl}/{osl}")
    return {
        "isl": isl, "osl": osl, "requests": count, "wall_s": wall, "output_tokens_per_s": rate, "tensorrt_llm": peer,
        "ratio": rate / peer if peer else None, "steps": llm.stats()["steps"] - before["steps"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--cells", default="128/128/4000")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cells = [tuple(map(int, cell.split("/"))) for cell in args.cells.split(",")]
    longest = max(100, *(isl + osl for isl, osl, _ in cells))
    started = time.monotonic()
    llm = LLM(
        folder_of(args.model), load_format="dummy", skip_tokenizer_init=True, quant=None if args.quant == "none" else args.quant,
        max_seq_len=longest + 8, kv_cache=KvCacheConfig(dtype=args.kv, enable_block_reuse=False),
        scheduler=SchedulerConfig(max_batch_size=args.batch, max_num_tokens=args.tokens),
        cuda_graph=CudaGraphConfig(batch_sizes=[1, 2, 4, 8, 16, 32, 64, *range(128, args.batch + 1, 64)], max_batch_size=args.batch, lazy=False),
    )  # fmt: skip
    print(llm.memory_plan, flush=True)
    rows = []
    llm._thread.ready.wait()
    print(f"ready after {time.monotonic() - started:.1f} s", flush=True)
    measure(llm, 64, 16, min(64, args.batch))
    for isl, osl, count in cells:
        row = {
            "model": args.model,
            "quant": args.quant,
            "kv": args.kv,
            "batch": args.batch,
            **measure(llm, isl, osl, count),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    llm.check_integrity()
    llm.shutdown()
    if args.out:
        args.out.write_text(
            json.dumps({"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
