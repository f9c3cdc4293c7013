"""Where the time of a decode step goes: kernels by total time, at a batch size and context, few layers, random weights.

python -m benchmarks.llm.profile_step --batch 1024 --context 1000 --quant fp8 --kv fp8
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.llm.shapes import folder_of
from venturi import LLM, CudaGraphConfig, KvCacheConfig, SamplingParams, SchedulerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quant", default="fp8")
    parser.add_argument("--kv", default="fp8")
    args = parser.parse_args()
    llm = LLM(
        folder_of("llama-8b", num_hidden_layers=args.layers), load_format="dummy", skip_tokenizer_init=True,
        quant=None if args.quant == "none" else args.quant, max_seq_len=args.context + 200,
        kv_cache=KvCacheConfig(dtype=args.kv, enable_block_reuse=False),
        scheduler=SchedulerConfig(max_batch_size=args.batch, max_num_tokens=8192),
        cuda_graph=CudaGraphConfig(batch_sizes=[args.batch], max_batch_size=args.batch, lazy=False),
    )  # fmt: skip
    prompts = torch.randint(10, 100000, (args.batch, args.context)).tolist()
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    outputs = [llm.generate_async(prompt, params) for prompt in prompts]
    while len(outputs[-1].token_times) < 10:
        time.sleep(0.01)
    before, start = llm.stats()["steps"], time.monotonic()
    time.sleep(0.5)
    steps, wall = llm.stats()["steps"] - before, time.monotonic() - start
    print(
        f"{1e3 * wall / steps:.2f} ms per step of {args.layers} layers, batch {args.batch}, context {args.context}",
        flush=True,
    )
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        time.sleep(0.2)
    table = trace.key_averages()
    for row in sorted(table, key=lambda r: -r.device_time_total)[:25]:
        if row.device_time_total:
            print(
                f"{row.device_time_total / 1e3:9.2f} ms {row.count:6d} x {row.device_time_total / max(1, row.count):9.1f} us  {row.key[:100]}"
            )
    llm.shutdown()


if __name__ == "__main__":
    main()
