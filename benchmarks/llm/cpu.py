"""Language models on the CPU beside transformers' generate: tokens per second, same weights, dtype, prompts and threads.

python -m benchmarks.llm.cpu
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers

from benchmarks.llm.shapes import folder_of
from venturi import LLM, KvCacheConfig, SamplingParams

DEMO = Path(__file__).parents[2] / "examples" / "llm" / "pydoc-5m"


def theirs(model: transformers.PreTrainedModel, prompts: torch.Tensor, tokens: int) -> float:
    start = time.monotonic()
    with torch.inference_mode():
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return time.monotonic() - start


def ours(llm: LLM, prompts: torch.Tensor, tokens: int) -> float:
    llm.clear_prefix_cache()
    start = time.monotonic()
    llm.generate(prompts.tolist(), SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    return time.monotonic() - start


def measure(name: str, folder: Path, dummy: bool, batch: int, isl: int, osl: int, repeats: int) -> dict:
    if dummy:
        config = transformers.AutoConfig.from_pretrained(folder)
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    else:
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompts = torch.randint(5, 4000, (batch, isl))
    with LLM(
        folder,
        device="cpu",
        dtype="bf16",
        load_format="dummy" if dummy else "auto",
        skip_tokenizer_init=True,
        kv_cache=KvCacheConfig(max_tokens=65536),
    ) as llm:
        for work in (lambda: theirs(peer, prompts, 4), lambda: ours(llm, prompts, 4)):
            work()
        pairs = [(theirs(peer, prompts, osl), ours(llm, prompts, osl)) for _ in range(repeats)]
    medians = [sorted(column)[repeats // 2] for column in zip(*pairs)]
    rate = [batch * osl / seconds for seconds in medians]
    return {
        "model": name,
        "batch": batch,
        "isl": isl,
        "osl": osl,
        "dtype": "bf16",
        "transformers_tokens_per_s": rate[0],
        "venturi_tokens_per_s": rate[1],
        "ratio": rate[1] / rate[0],
        "seconds": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for name, folder, dummy in (("pydoc-5m", DEMO, False), ("qwen2-0.5b shape", folder_of("qwen-0.5b"), True)):
        for batch in (1, 16):
            rows.append(measure(name, folder, dummy, batch, 64, 64 if not dummy else 24, args.repeats))
            print(
                json.dumps(
                    {k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items() if k != "seconds"}
                ),
                flush=True,
            )
    if args.out:
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": platform.processor(),
            "threads": torch.get_num_threads(),
        }
        args.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
