"""`LLM` as a user meets it, over the committed demo model and over tiny ones: answers, options, wrong input."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import venturi as vt
from tests.llm.tiny import TINY, make
from venturi import LLM, GuidedDecodingParams, KvCacheConfig, ModelError, RequestError, SamplingParams, SchedulerConfig

DEMO = Path(__file__).parents[2] / "examples" / "llm" / "pydoc-5m"
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm():
    with LLM(DEMO, device="cpu", kv_cache=KvCacheConfig(max_tokens=8192)) as llm:
        yield llm
        llm.check_integrity()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make("llama2", tmp_path)
    return tmp_path


def test_text_and_token_prompts_agree(llm: LLM) -> None:
    by_text = llm.generate("Return the ", GREEDY)
    by_ids = llm.generate(by_text.prompt_token_ids, GREEDY)
    by_record = llm.generate({"prompt": "Return the "}, GREEDY)
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids == by_record.outputs[0].token_ids
    assert by_text.outputs[0].text
    assert by_text.outputs[0].finish_reason in ("length", "stop")
    assert by_text.prompt == "Return the "


def test_the_demo_model_has_learned_its_text(llm: LLM) -> None:
    end = llm.tokenizer.end_id
    documents = (DEMO / "heldout.txt").read_text().split("\n<|end|>\n")
    tokens = [i for text in documents for i in [end, *llm.tokenizer.encode(text)]]
    windows = [tokens[i : i + 256] for i in range(0, 12 * 256, 256)]
    outputs = llm.generate(windows, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    rows = [next(iter(row.values())).logprob for output in outputs for row in output.prompt_logprobs[1:]]
    assert len(rows) == 12 * 255
    perplexity = torch.tensor(rows).mean().neg().exp()
    assert (
        5 < perplexity < 80
    )  # over all 36 windows the training script found 44.9; 4096 for a model that knows nothing


def test_streaming_pieces_join_to_the_whole(llm: LLM) -> None:
    whole = llm.generate("This module", GREEDY).outputs[0]
    pieces, ids = "", []
    for now in llm.generate_async("This module", GREEDY):
        pieces += now.outputs[0].text_diff
        ids += now.outputs[0].token_ids_diff
    assert (pieces, ids) == (whole.text, whole.token_ids)


def test_async_iteration_and_await(llm: LLM) -> None:
    async def work():
        seen = [len(now.outputs[0].token_ids) async for now in llm.generate_async("This", GREEDY)]
        return seen, await llm.generate_async("This", GREEDY)

    seen, output = asyncio.run(work())
    assert seen == sorted(seen)
    assert seen[-1] == len(output.outputs[0].token_ids)


def test_seeded_sampling_does_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.2, top_k=50, top_p=0.9, seed=11)
    alone = llm.generate("The function", params).outputs[0].token_ids
    others = [f"number {i} of" for i in range(6)]
    together = llm.generate([*others, "The function"], params)[-1].outputs[0].token_ids
    assert alone[:3] == together[:3]  # bf16 products of other shapes may round differently later on
    several = llm.generate("The function", SamplingParams(max_tokens=10, n=3, seed=11)).outputs
    assert len({tuple(o.token_ids) for o in several}) == 3


def test_best_of_returns_the_likeliest(llm: LLM) -> None:
    output = llm.generate("Return", SamplingParams(n=2, best_of=5, max_tokens=6, seed=1))
    scores = [o.cumulative_logprob for o in output.outputs]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)


def test_beam_search_agrees_with_transformers(tmp_path: Path) -> None:
    theirs = make("llama2", tmp_path)
    prompts = [[5, 9, 11], [100, 3, 7, 8, 50], [42]]
    with LLM(tmp_path, device="cpu", kv_cache=KvCacheConfig(max_tokens=2048)) as llm:
        params = SamplingParams(use_beam_search=True, n=4, max_tokens=9, ignore_eos=True)
        for prompt, output in zip(prompts, llm.generate(prompts, params)):
            wanted = theirs.generate(
                torch.tensor([prompt]),
                num_beams=4,
                num_return_sequences=4,
                max_new_tokens=9,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert [o.token_ids for o in output.outputs] == [row[len(prompt) :].tolist() for row in wanted]
        llm.check_integrity()


def test_beam_search_finds_what_exhaustive_search_finds(tiny: Path) -> None:
    with LLM(tiny, device="cpu", kv_cache=KvCacheConfig(max_tokens=32768)) as llm:
        wide = llm.generate([5, 9], SamplingParams(use_beam_search=True, n=199, max_tokens=2, ignore_eos=True)).outputs[
            0
        ]
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=100)
        first = llm.generate([5, 9], SamplingParams(temperature=0, max_tokens=1, logprobs=100)).outputs[0].logprobs[0]
        best = max(
            entry.logprob + max(e.logprob for e in llm.generate([5, 9, token], asked).outputs[0].logprobs[0].values())
            for token, entry in list(first.items())[:20]
        )
        assert wide.cumulative_logprob == pytest.approx(best, abs=1e-3)


def test_stops(llm: LLM) -> None:
    base = llm.generate("Return the", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)).outputs[0]
    word = base.text.split()[2]
    cut = llm.generate("Return the", SamplingParams(temperature=0, max_tokens=30, stop=word)).outputs[0]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", word)
    assert cut.text == base.text[: base.text.find(word)]
    kept = llm.generate(
        "Return the", SamplingParams(temperature=0, max_tokens=30, stop=[word], include_stop_str_in_output=True)
    )
    assert kept.outputs[0].text.endswith(word)
    token = base.token_ids[3]
    by_id = llm.generate("Return the", SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[token])).outputs[0]
    assert by_id.stop_reason == token
    assert by_id.token_ids == base.token_ids[: base.token_ids.index(token) + 1]


def test_edits_of_logits(llm: LLM) -> None:
    base = llm.generate("Return the", GREEDY).outputs[0].token_ids
    bias = llm.generate("Return the", SamplingParams(temperature=0, max_tokens=3, logit_bias={77: 1e4})).outputs[0]
    assert bias.token_ids == [77, 77, 77]
    banned = llm.generate("Return the", SamplingParams(temperature=0, max_tokens=12, bad_token_ids=[base[0]])).outputs[
        0
    ]
    assert base[0] not in banned.token_ids
    bigrams = llm.generate("a b a b a b a", SamplingParams(temperature=0, max_tokens=20, no_repeat_ngram_size=2))
    everything = bigrams.prompt_token_ids + bigrams.outputs[0].token_ids
    fresh = [tuple(everything[i : i + 2]) for i in range(len(bigrams.prompt_token_ids) - 1, len(everything) - 1)]
    assert len(set(fresh)) == len(fresh)
    forced = llm.generate(
        "x",
        SamplingParams(
            temperature=0,
            max_tokens=4,
            logits_processor=lambda row, ids: row.index_fill(0, torch.tensor([len(ids)]), 1e5),
        ),
    )
    count = len(forced.prompt_token_ids)
    assert forced.outputs[0].token_ids == [count, count + 1, count + 2, count + 3]
    penal = llm.generate("a a a a a", SamplingParams(temperature=0, max_tokens=10, repetition_penalty=1e6))
    assert len(set(penal.outputs[0].token_ids)) == 10


@pytest.mark.parametrize(
    ("guide", "check"),
    [
        (GuidedDecodingParams(regex=r"[0-9]{3}-[a-f]{1,4};"), lambda t: t[:3].isdigit() and t.endswith(";")),
        (GuidedDecodingParams(choice=["yes", "no", "maybe"]), lambda t: t in ("yes", "no", "maybe")),
        (
            GuidedDecodingParams(
                json={
                    "type": "object",
                    "properties": {"a": {"enum": [1, 2]}},
                    "required": ["a"],
                    "additionalProperties": False,
                }
            ),
            lambda t: json.loads(t)["a"] in (1, 2),
        ),
        (GuidedDecodingParams(grammar='start: "x" "y"~1..3 "z"'), lambda t: t[0] == "x" and t[-1] == "z"),
    ],
)
def test_guided_decoding(llm: LLM, guide: GuidedDecodingParams, check) -> None:
    output = llm.generate("Answer:", SamplingParams(max_tokens=60, temperature=0.5, seed=3, n=2, guided_decoding=guide))
    for one in output.outputs:
        assert one.finish_reason == "stop"
        assert check(one.text), one.text


def test_prefix_cache_is_used_and_changes_nothing(llm: LLM) -> None:
    prompt = list(range(100, 240))
    first = llm.generate(prompt, GREEDY)
    again = llm.generate(prompt, GREEDY)
    assert again.num_cached_tokens >= 128
    assert first.outputs[0].token_ids == again.outputs[0].token_ids
    llm.clear_prefix_cache()
    assert llm.generate(prompt, GREEDY).num_cached_tokens == 0


def test_abort_frees_everything(llm: LLM) -> None:
    output = llm.generate_async("Return", SamplingParams(max_tokens=450, ignore_eos=True, temperature=0))
    next(iter(output))
    output.abort()
    assert output.result(timeout=30).outputs[0].finish_reason == "cancelled"
    llm.check_integrity()
    assert llm.stats()["sequences_running"] == 0


def test_one_bad_request_fails_alone(llm: LLM) -> None:
    def broken(row, ids):
        raise ZeroDivisionError("mine")

    good = llm.generate_async("Return", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    bad = llm.generate_async("Return", SamplingParams(logits_processor=broken))
    with pytest.raises(RequestError, match="ZeroDivisionError"):
        bad.result(timeout=30)
    assert len(good.result(timeout=30).outputs[0].token_ids) == 30
    outputs = llm.generate(["fine", [10**9], ""], GREEDY)
    assert [o.error is None for o in outputs] == [True, False, False]
    with pytest.raises(RequestError, match="outside the vocabulary"):
        _ = outputs[1].outputs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate([1] * 3000), "3000 tokens, the context holds 512"),
        (lambda llm: llm.generate(""), "prompt is empty"),
        (lambda llm: llm.generate(3.5), "a prompt is"),
        (lambda llm: llm.generate({"text": "x"}), "prompt_token_ids"),
        (lambda llm: llm.generate(["a", "b"], [SamplingParams()]), "2 prompts but 1"),
        (lambda llm: llm.generate("a", {"n": 1}), "SamplingParams"),
        (lambda llm: llm.generate([{"role": "user", "content": "hi"}]), "chat template"),
        (lambda llm: llm.generate("a", SamplingParams(stop_token_ids=[99999])), "stop_token_ids"),
        (
            lambda llm: llm.generate("a", SamplingParams(guided_decoding=GuidedDecodingParams(regex="("))),
            "guided_decoding",
        ),
        (
            lambda llm: llm.generate([5] * 200, SamplingParams(n=256, best_of=256, max_tokens=300, seed=1)),
            "can never fit",
        ),
        (lambda llm: SamplingParams(temprature=1), "Did you mean 'temperature'"),
        (lambda llm: SamplingParams(n=3, temperature=0), "temperature=0"),
        (lambda llm: SamplingParams(top_p=1.5, max_tokens=0), "max_tokens=0.*top_p=1.5"),
        (lambda llm: GuidedDecodingParams(regex="a", choice=["b"]), "exactly one"),
        (lambda llm: KvCacheConfig(tokens_per_block=24), "power of two"),
    ],
)
def test_wrong_requests_say_what_is_wrong(llm: LLM, call, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call(llm)


def test_nobody_waits_for_an_engine_that_is_gone(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", kv_cache=KvCacheConfig(max_tokens=1024))
    running = llm.generate_async([5], SamplingParams(max_tokens=400, ignore_eos=True, temperature=0))
    llm.shutdown()
    assert running.result(timeout=30).outputs[0].finish_reason == "cancelled"
    with pytest.raises(RequestError, match="shut down"):
        llm.generate([5], GREEDY)
    broken = LLM(tiny, device="cpu", kv_cache=KvCacheConfig(max_tokens=1024))
    broken._scheduler.schedule = lambda: 1 / 0
    lost = broken.generate_async([5], GREEDY)
    with pytest.raises(vt.InternalError, match="ZeroDivisionError"):
        lost.result(timeout=30)
    with pytest.raises(vt.InternalError, match="has failed"):
        broken.generate([5], GREEDY)


def test_a_chat_template_makes_the_prompt(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    with LLM(tmp_path / "m", device="cpu", kv_cache=KvCacheConfig(max_tokens=1024)) as llm:
        output = llm.generate([{"role": "user", "content": "hello"}], GREEDY)
        assert output.prompt == "<user>hello<assistant>"
        (tmp_path / "m" / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}{{ raise_exception('no') }}")
    with (
        LLM(tmp_path / "m", device="cpu", kv_cache=KvCacheConfig(max_tokens=1024)) as llm,
        pytest.raises(RequestError, match="refused"),
    ):
        llm.generate([{"role": "user", "content": "hello"}], GREEDY)


def test_damaged_folders(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    load = lambda: LLM(tiny, device="cpu", kv_cache=KvCacheConfig(max_tokens=1024)).shutdown()  # noqa: E731
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp.up" not in k} | {"odd.weight": torch.zeros(2)},
        tiny / "model.safetensors",
    )
    with pytest.raises(ModelError, match=r"missing: layers\.1\.mlp\.gate_up_proj\.weight; 1 unknown: odd\.weight"):
        load()
    save_file(weights | {"model.norm.weight": torch.zeros(7)}, tiny / "model.safetensors")
    with pytest.raises(ModelError, match=r"shape \[7\], the config asks for \[48\]"):
        load()
    (tiny / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(ModelError, match="cannot be read"):
        load()
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no \\*.safetensors"):
        load()
    (tiny / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "../x.safetensors"}})
    )
    with pytest.raises(ModelError, match="outside its folder"):
        load()
    (tiny / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load()
    with pytest.raises(ModelError, match="nothing is downloaded"):
        LLM("meta-llama/Llama-3.1-8B")


def test_constructor_arguments_are_checked(tiny: Path) -> None:
    for arguments, error, message in [
        ({"max_seq_len": 100000}, RequestError, "context of 512"),
        ({"dtype": "int3"}, RequestError, "fp16"),
        ({"quant": "int2"}, RequestError, "fp8"),
        ({"tensor_parallel_size": 2}, RequestError, "one device"),
        ({"device": "tpu"}, vt.DeviceError, "cuda"),
        ({"kv_cache": KvCacheConfig(max_tokens=10**12)}, vt.DeviceError, "does not fit"),
    ]:
        with pytest.raises(error, match=message):
            LLM(tiny, **({"device": "cpu"} | arguments))
    with pytest.raises(TypeError):
        LLM(tiny, devise="cpu")


@pytest.mark.parametrize("name", ["llama2", "gemma3", "qwen3-moe", "deepseek-v3"])
def test_bf16_and_fp8_stay_near_fp32(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = torch.randint(3, TINY[name][1]["vocab_size"], (60,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {}
    for kind in ({"dtype": "fp32"}, {"dtype": "bf16"}, {"dtype": "fp32", "quant": "fp8"}):
        with LLM(tmp_path, device="cpu", kv_cache=KvCacheConfig(max_tokens=1024), **kind) as llm:
            output = llm.generate(prompt, asked)
            rows[str(kind)] = torch.tensor([next(iter(r.values())).logprob for r in output.prompt_logprobs[1:]])
    exact, *others = rows.values()
    for other in others:
        assert (other - exact).abs().median() < 0.35


def test_many_requests_in_a_small_cache(tiny: Path) -> None:
    prompts = [[(7 * i + j) % 190 + 3 for j in range(i % 40 + 1)] for i in range(40)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with LLM(tiny, device="cpu", kv_cache=KvCacheConfig(max_tokens=8192)) as roomy:
        wanted = [o.outputs[0].token_ids for o in roomy.generate(prompts, params)]
    for policy in ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION"):
        kv = KvCacheConfig(max_tokens=160, tokens_per_block=8, host_cache_size=1 << 20)
        scheduler = SchedulerConfig(capacity_scheduler_policy=policy, max_num_tokens=50)
        with LLM(tiny, device="cpu", kv_cache=kv, scheduler=scheduler) as tight:
            assert [o.outputs[0].token_ids for o in tight.generate(prompts, params)] == wanted
            tight.check_integrity()
            assert (tight.stats()["pauses"] > 0) == (policy == "MAX_UTILIZATION")
