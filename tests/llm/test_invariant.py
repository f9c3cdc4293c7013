"""deterministic=True: a request gives the same bits alone and among 63 others, whatever they are."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from tests.llm.tiny import make
from venturi import LLM, KvCacheConfig, RequestError, SamplingParams, SchedulerConfig
from venturi.llm.invariant import ROWS, FixedRows, by_row, check_device
from venturi.llm.layers.linear import Linear, PlainMethod

OWN = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=7, logprobs=2, prompt_logprobs=1, ignore_eos=True)


def requests(count, vocab=150):
    """Prompts of 1 to 90 tokens with parameters of their own."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, vocab) for _ in range(rng.randrange(1, 90))] for _ in range(count)]
    params = [
        SamplingParams(
            max_tokens=rng.randrange(1, 20),
            temperature=rng.choice([0, 0.7]),
            seed=i,
            top_k=rng.choice([0, 5]),
            ignore_eos=True,
        )
        for i in range(count)
    ]
    return prompts, params


def trace(output):
    one = output.outputs[0]
    rows = [*one.logprobs, *(r for r in output.prompt_logprobs if r)]
    return one.token_ids, [[(t, p.logprob) for t, p in row.items()] for row in rows]


def alone_and_in_company(folder, dtype, prompt, *, deterministic=True, **options):
    """Steps of 40 tokens cut prompts into other pieces when there is company; alone, the cache is cold."""
    with LLM(
        folder, device="cpu", dtype=dtype, deterministic=deterministic, skip_tokenizer_init=True,
        kv_cache=KvCacheConfig(max_tokens=16384), scheduler=SchedulerConfig(max_num_tokens=40, max_batch_size=64), **options,
    ) as llm:  # fmt: skip
        alone = llm.generate(prompt, OWN)
        llm.clear_prefix_cache()
        prompts, params = requests(63)
        outputs = llm.generate([*prompts[:31], prompt, *prompts[31:]], [*params[:31], OWN, *params[31:]])
        return trace(alone), trace(outputs[31])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["llama2", "llama3", "qwen3", "gemma2", "gpt2", "phi4-mini", "mixtral", "gpt-oss", "deepseek-v3"]
)
def test_the_same_bits_alone_and_among_63_others(tmp_path, name, dtype):
    """Heads of odd sizes, soft caps, windows, sinks, experts and latent attention included."""
    make(name, tmp_path)
    alone, company = alone_and_in_company(tmp_path, dtype, [11, 40, 9] * 17)
    assert alone == company


@pytest.mark.parametrize("options", [{"quant": "fp8"}, {"dtype": "fp16"}], ids=str)
def test_other_numbers(tmp_path, options):
    make("llama2", tmp_path)
    dtype = options.pop("dtype", "bf16")
    alone, company = alone_and_in_company(tmp_path, dtype, [11, 40, 9] * 17, **options)
    assert alone == company


def test_a_width_that_generated_code_serves(tmp_path):
    """Heads of 32 in bf16: generated attention over chunks of any length."""
    make("llama2", tmp_path)
    wide = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 200}
    options = {"model_kwargs": wide, "load_format": "dummy"}
    alone, company = alone_and_in_company(tmp_path, "bf16", [11, 40, 9] * 17, **options)
    assert alone == company


def test_without_it_bits_differ(tmp_path):
    """What the mode is for; and that the tests above could fail."""
    make("llama2", tmp_path)
    alone, company = alone_and_in_company(tmp_path, "fp32", [11, 40, 9] * 17, deterministic=False)
    assert alone != company


def test_tokens_are_those_of_the_usual_mode(tmp_path):
    make("llama2", tmp_path)
    found = []
    for deterministic in (False, True):
        with LLM(
            tmp_path,
            device="cpu",
            dtype="fp32",
            deterministic=deterministic,
            skip_tokenizer_init=True,
            kv_cache=KvCacheConfig(max_tokens=512),
        ) as llm:
            found.append(
                llm.generate([5, 9, 30], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
                .outputs[0]
                .token_ids
            )
            assert ("deterministic" in llm.explain()) is deterministic
    assert found[0] == found[1]


def test_fixed_rows_and_rows_by_themselves():
    torch.manual_seed(0)
    layer = Linear(40, 24)
    layer.weight.data.normal_()
    method = FixedRows(PlainMethod(), layer)
    x = torch.randn(2 * ROWS + 5, 40)
    whole = method.apply(layer, x)
    torch.testing.assert_close(whole, F.linear(x, layer.weight))
    for i in (0, 3, ROWS, len(x) - 1):
        assert torch.equal(method.apply(layer, x[i : i + 1])[0], whole[i])
    function = by_row(F.silu)
    assert torch.equal(function(x)[7], F.silu(x[7:8])[0])
    assert function(x[:1]).shape == (1, 40)


class DependsOnPlace(PlainMethod):
    """A library whose last row is rounded another way."""

    def apply(self, layer, x):
        y = super().apply(layer, x)
        return torch.cat((y[:-1], y[-1:] * 1.001)) if len(y) > 1 else y


def test_a_library_that_rounds_by_place_gets_one_row_at_a_time():
    layer = Linear(40, 24)
    layer.weight.data.normal_()
    method = FixedRows(DependsOnPlace(), layer)
    assert method.name.endswith("1 rows at a time")
    x = torch.randn(5, 40)
    assert torch.equal(method.apply(layer, x)[4], method.apply(layer, x[4:])[0])


def test_other_devices_are_refused():
    with pytest.raises(RequestError, match="on the CPU only"):
        check_device(torch.device("cuda", 0))
