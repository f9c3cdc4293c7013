"""Penalties, biases and bans of many requests at once, against one row computed by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.llm.tiny import make
from venturi import LLM, KvCacheConfig, SamplingParams, SchedulerConfig
from venturi.core.errors import InternalError, RequestError
from venturi.kernels.penalties import IN_PROMPT
from venturi.llm.history import TokenHistory
from venturi.llm.logit_edits import edit_logits
from venturi.llm.request import PENDING, Request, Sequence

CPU = torch.device("cpu")


def sequence(prompt: list[int], output: list[int], slot: int, **settings: object) -> Sequence:
    request = Request(prompt, SamplingParams(**settings), 100)
    seq = request.sequences[0]
    seq.tokens += output
    seq.slot = slot
    return seq


def by_hand(row: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams) -> torch.Tensor:
    found = row.tolist()
    for token in set(prompt + output):
        x = found[token]
        found[token] = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
    for token, times in Counter(output).items():
        found[token] -= params.presence_penalty + params.frequency_penalty * times
    return torch.tensor(found)


SETTINGS = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.25},
    {},
]


def test_penalties_of_many_rows() -> None:
    history, logits = TokenHistory(8, CPU), torch.randn(5, 40)
    logits[1, 3] = float("-inf")
    seqs = [sequence([1, 2, 3, 3], [3, 5, 5, 9], 7 - i, **s) for i, s in enumerate(SETTINGS)]
    before = logits.clone()
    assert not edit_logits(logits, seqs, [8] * 5, history).all_errors()
    for i, seq in enumerate(seqs):
        wanted = by_hand(before[i], [1, 2, 3, 3], [3, 5, 5, 9], seq.request.params)
        torch.testing.assert_close(logits[i], wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[4], before[4])


def test_what_is_drawn_counts_without_being_known_on_the_host() -> None:
    history, seq = TokenHistory(4, CPU), sequence([1, 2], [], 3, repetition_penalty=2.0, frequency_penalty=1.0)
    drawn: list[int] = []
    for token in (5, 5, 1, 30):
        logits, position = torch.randn(1, 40), len(seq.tokens)
        wanted = by_hand(logits[0], [1, 2], drawn, seq.request.params)
        history.penalize(logits, [seq], [position])
        torch.testing.assert_close(logits[0], wanted, rtol=1e-6, atol=1e-6)
        history.remember([seq], [position], torch.tensor([token]))
        drawn.append(token)
        seq.tokens.append(PENDING)
    stranger = sequence([1, 2], [PENDING], 2, repetition_penalty=2.0)
    with pytest.raises(InternalError, match="nobody counted"):
        history.penalize(torch.zeros(1, 40), [stranger], [3])


def test_a_slot_forgets_whom_it_belonged_to() -> None:
    history = TokenHistory(1, CPU)
    for prompt in ([1, 2, 3], [4], [1, 2, 3]):
        seq, logits = sequence(prompt, [], 0, repetition_penalty=2.0), torch.ones(1, 10)
        history.penalize(logits, [seq], [len(prompt)])
        assert (logits[0] != 1).nonzero().flatten().tolist() == prompt


def test_bans_and_biases_of_many_rows() -> None:
    history, logits = TokenHistory(8, CPU), torch.zeros(5, 10)
    seqs = [
        sequence([1], [], 0, bad_token_ids=[2, 3]),
        sequence([1, 2, 1], [], 1, no_repeat_ngram_size=2),
        sequence([1], [], 2, logit_bias={4: 1.5, 5: -2.0}, bad_token_ids=[5]),
        sequence([1], [], 3),
        sequence([1], [], 4, bad_token_ids=list(range(10))),
    ]
    seqs[3].request.edits_logits = True
    seqs[3].request.bad_words = [[1, 7], [2, 8], [9]]
    errors = edit_logits(logits, seqs, [len(seq.tokens) for seq in seqs], history).all_errors()
    excluded = [(row == float("-inf")).nonzero().flatten().tolist() for row in logits]
    assert excluded == [[2, 3], [2], [5], [7, 9], list(range(10))]
    assert logits[2, 4] == 1.5
    assert list(errors) == [4]
    with pytest.raises(RequestError, match="every token is excluded"):
        raise errors[4]


def test_an_error_is_its_rows_alone() -> None:
    def fail(row: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        raise ValueError("no")

    seqs = [sequence([1], [], 0, logits_processor=fail), sequence([1], [], 1, logit_bias={2: 3.0})]
    logits = torch.zeros(2, 5)
    errors = edit_logits(logits, seqs, [1, 1], TokenHistory(2, CPU)).all_errors()
    assert list(errors) == [0]
    assert "no" in str(errors[0])
    assert logits[1].tolist() == [0, 0, 3, 0, 0]


def test_counts_do_not_run_into_the_prompts_flag() -> None:
    assert IN_PROMPT > 1 << 23
    assert 2 * IN_PROMPT < 2**31


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 0.9, "seed": 4, "n": 3}, {"use_beam_search": True, "n": 3}],
    ids=["greedy", "three", "beams"],
)
def test_the_same_as_a_processor_that_sees_all_tokens(settings: dict, overlap: bool, tmp_path: Path) -> None:
    """Also where requests are paused for lack of room and computed again."""
    make("llama2", tmp_path)
    penalties = SamplingParams(
        max_tokens=30, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, ignore_eos=True, **settings
    )

    def asked(prompt: list[int]) -> SamplingParams:
        def naive(row: torch.Tensor, tokens: list[int]) -> torch.Tensor:
            return by_hand(row, prompt, tokens[len(prompt) :], penalties)

        return SamplingParams(max_tokens=30, logits_processor=naive, ignore_eos=True, **settings)

    prompts = [[5, 9, 5], list(range(20)), [7] * 12]
    scheduler = SchedulerConfig(max_batch_size=16, capacity_scheduler_policy="MAX_UTILIZATION", overlap=overlap)
    cache = KvCacheConfig(max_tokens=160, tokens_per_block=8)
    with LLM(tmp_path, device="cpu", dtype="fp32", kv_cache=cache, scheduler=scheduler) as llm:
        ours, theirs = llm.generate(prompts, penalties), llm.generate(prompts, [asked(p) for p in prompts])
        assert llm.stats()["pauses"] > 0 or penalties.width == 1
        plain = llm.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True, **settings))
    for a, b, c in zip(ours, theirs, plain):
        assert [o.token_ids for o in a.outputs] == [o.token_ids for o in b.outputs]
        assert [o.token_ids for o in a.outputs] != [o.token_ids for o in c.outputs]


def test_beams_go_by_edited_logits(tmp_path: Path) -> None:
    make("llama2", tmp_path)
    with LLM(tmp_path, device="cpu", dtype="fp32", kv_cache=KvCacheConfig(max_tokens=512)) as llm:
        beams = SamplingParams(use_beam_search=True, n=2, max_tokens=6, ignore_eos=True)
        first = llm.generate([5, 9], beams).outputs[0].token_ids[0]
        banned = llm.generate([5, 9], beams.model_copy(update={"bad_token_ids": [first]}))
        assert all(first not in one.token_ids for one in banned.outputs)
        only = beams.model_copy(
            update={"logits_processor": lambda row, ids: torch.where(torch.arange(len(row)) == 7, row, float("-inf"))}
        )
        found = llm.generate([5, 9], only).outputs
        assert found[0].token_ids == [7] * 6
        assert found[0].cumulative_logprob == pytest.approx(0.0, abs=1e-5)
