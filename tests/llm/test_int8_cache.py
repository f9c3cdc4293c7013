"""Generating over an int8 KV cache: as good as without, whatever happens to blocks on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.llm.tiny import make
from venturi import LLM, KvCacheConfig, RequestError, SamplingParams, SchedulerConfig

DEMO = Path(__file__).parents[2] / "examples" / "llm" / "pydoc-5m"


def perplexity(dtype: str) -> float:
    """Of eight windows of the held-out text."""
    with LLM(DEMO, device="cpu", kv_cache=KvCacheConfig(max_tokens=8192, dtype=dtype)) as llm:
        end = llm.tokenizer.end_id
        documents = (DEMO / "heldout.txt").read_text().split("\n<|end|>\n")
        tokens = [i for text in documents for i in [end, *llm.tokenizer.encode(text)]]
        windows = [tokens[i : i + 256] for i in range(0, 8 * 256, 256)]
        outputs = llm.generate(windows, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        llm.check_integrity()
    rows = [next(iter(row.values())).logprob for output in outputs for row in output.prompt_logprobs[1:]]
    return float(torch.tensor(rows).mean().neg().exp())


def test_perplexity_is_that_of_the_whole_cache() -> None:
    assert perplexity("int8") == pytest.approx(perplexity("auto"), rel=0.01)


def test_blocks_that_are_shared_copied_swapped_and_computed_again(tmp_path: Path) -> None:
    make("llama2", tmp_path)
    prompts = [[5, 9, 5], list(range(20)), [*range(18), 7], [7] * 12]
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=3, n=2, ignore_eos=True)
    scheduler = SchedulerConfig(max_batch_size=16, capacity_scheduler_policy="MAX_UTILIZATION")

    def generated(**cache: object) -> tuple[list[list[int]], dict]:
        kv = KvCacheConfig(tokens_per_block=8, dtype="int8", **cache)
        with LLM(tmp_path, device="cpu", dtype="fp32", kv_cache=kv, scheduler=scheduler) as llm:
            found = [one.token_ids for o in llm.generate(prompts, params) for one in o.outputs]
            llm.check_integrity()
            return found, llm.stats()

    roomy, _ = generated(max_tokens=2048)
    computed_again, paused = generated(max_tokens=160)
    swapped, moved = generated(max_tokens=160, host_cache_size=1 << 20)
    assert roomy == computed_again == swapped
    assert paused["pauses"] > 0
    assert moved["pauses"] > 0


def test_the_plan_counts_scales(tmp_path: Path) -> None:
    make("llama2", tmp_path)
    with LLM(tmp_path, device="cpu", dtype="fp32", kv_cache=KvCacheConfig(max_tokens=512, dtype="int8")) as llm:
        layers = llm.runner.pool.layers
        held = sum(x.nbytes for layer in layers for x in (layer.k, layer.v, *layer.scales))
        spare = held // (llm.memory_plan.num_blocks + 1)
        assert llm.memory_plan.cache in (held, held - spare)


def test_latent_attention_says_what_to_do(tmp_path: Path) -> None:
    make("deepseek-v3", tmp_path)
    with pytest.raises(RequestError, match="MLA.*fp8"):
        LLM(tmp_path, device="cpu", kv_cache=KvCacheConfig(max_tokens=512, dtype="int8"))
