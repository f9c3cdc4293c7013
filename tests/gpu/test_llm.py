"""Language models on the GPU against the same weights on the CPU: logits of prompts, tokens, graphs, fused decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from venturi.llm.api import LLM
from venturi.llm.config import CudaGraphConfig, KvCacheConfig, SchedulerConfig
from venturi.llm.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu
CONFIGS = json.loads((Path(__file__).parent / "llm_configs.json").read_text())
LLAMA = CONFIGS["llama2"] | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "vocab_size": 1000}


def make(tmp_path: Path, config: dict, device: str, dtype: str, **settings) -> LLM:
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {
        "kv_cache": KvCacheConfig(max_tokens=4096, tokens_per_block=16),
        "scheduler": SchedulerConfig(max_num_tokens=64, max_batch_size=32),
    } | settings
    return LLM(tmp_path, device=device, dtype=dtype, load_format="dummy", max_seq_len=256, **settings)


def same_weights(source: LLM, target: LLM) -> None:
    with torch.no_grad():
        for a, b in zip(source.loaded.model.parameters(), target.loaded.model.parameters()):
            b.copy_(a)


def prompts(vocab: int, counts=(1, 40, 17, 90, 3)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in counts]


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0, prompt_logprobs=0)


def logprobs(output) -> tuple[list[int], torch.Tensor]:
    one = output.outputs[0]
    rows = [next(iter(r.values())).logprob for r in output.prompt_logprobs[1:]] + [
        r[t].logprob for r, t in zip(one.logprobs, one.token_ids)
    ]
    return one.token_ids, torch.tensor(rows)


NAMES = ["llama3", "mistral", "qwen3", "gemma3", "phi4-mini", "gpt2"]  # every kernel variant
EXPERTS = ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v2", "deepseek-v3"]  # every kind of routing and of gate


@pytest.mark.parametrize("name", NAMES + EXPERTS)
def test_fp32_matches_the_cpu(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    with make(tmp_path, config, "cpu", "fp32") as cpu, make(tmp_path, config, "cuda", "fp32") as gpu:
        same_weights(cpu, gpu)
        asked = prompts(config["vocab_size"])
        for a, b in zip(cpu.generate(asked, GREEDY), gpu.generate(asked, GREEDY)):
            (tokens, rows), (own_tokens, own_rows) = logprobs(a), logprobs(b)
            torch.testing.assert_close(own_rows, rows, rtol=1e-3, atol=1e-3)
            assert own_tokens == tokens
        gpu.check_integrity()
        assert "captured: [" in gpu.explain()


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_fused_decode_matches_the_modules(quant: str | None, tmp_path: Path) -> None:
    with (
        make(tmp_path, LLAMA, "cuda", "bf16", quant=quant) as fused,
        make(tmp_path, LLAMA, "cuda", "bf16", quant=quant, cuda_graph=CudaGraphConfig(enabled=False)) as plain,
    ):
        with torch.no_grad():
            for llm in (fused, plain):
                for p in llm.loaded.model.parameters():
                    assert torch.isfinite(p.float()).all()
        asked = prompts(1000, (5, 20, 33))
        a, b = fused.generate(asked, GREEDY), plain.generate(asked, GREEDY)
        assert "captured: [" in fused.explain()
        for x, y in zip(a, b):
            (tokens, rows), (own_tokens, own_rows) = logprobs(y), logprobs(x)
            agree = next((i for i, (s, t) in enumerate(zip(tokens, own_tokens)) if s != t), len(tokens))
            assert agree >= 1, "the first tokens differ"
            count = len(rows) - len(tokens) + agree
            torch.testing.assert_close(own_rows[:count], rows[:count], rtol=0.05, atol=0.15 if quant is None else 0.4)


def test_overlap_and_graphs_give_the_same_tokens(tmp_path: Path) -> None:
    asked = prompts(1000, tuple(range(1, 25)))
    params = SamplingParams(max_tokens=20, temperature=0.8, top_k=40, top_p=0.9, seed=5, ignore_eos=True)
    answers = []
    for overlap in (False, True):
        scheduler = SchedulerConfig(max_num_tokens=64, max_batch_size=32, overlap=overlap)
        with make(
            tmp_path, LLAMA, "cuda", "fp32", scheduler=scheduler, cuda_graph=CudaGraphConfig(enabled=overlap)
        ) as llm:
            answers.append([o.outputs[0].token_ids for o in llm.generate(asked, params)])
            llm.check_integrity()
    assert answers[0] == answers[1]


def test_swapping_and_pausing_on_the_device(tmp_path: Path) -> None:
    scheduler = SchedulerConfig(max_num_tokens=64, max_batch_size=16, capacity_scheduler_policy="MAX_UTILIZATION")
    asked = prompts(1000, (20,) * 12)
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    with make(tmp_path, LLAMA, "cuda", "fp32") as roomy:
        wanted = [o.outputs[0].token_ids for o in roomy.generate(asked, params)]
    kv = KvCacheConfig(max_tokens=256, tokens_per_block=16, host_cache_size=1 << 22)
    with make(tmp_path, LLAMA, "cuda", "fp32", scheduler=scheduler, kv_cache=kv) as tight:
        assert [o.outputs[0].token_ids for o in tight.generate(asked, params)] == wanted
        assert tight.stats()["pauses"] > 0
        tight.check_integrity()
