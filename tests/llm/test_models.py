"""Every architecture against transformers: logits of prefill and decode through the paged cache, in a mixed batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.llm.tiny import TINY, make
from venturi.core.errors import ModelError
from venturi.llm.config import SchedulerConfig
from venturi.llm.kv.cache import KvCache
from venturi.llm.kv.pool import KvPool
from venturi.llm.loader import build_model
from venturi.llm.loop import EngineLoop
from venturi.llm.request import Request
from venturi.llm.runner import TorchRunner
from venturi.llm.sampling_params import SamplingParams
from venturi.llm.scheduler.scheduler import Scheduler

STEPS = 32


@torch.no_grad()
def reference(model, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the logits of all positions of prompt + output."""
    tokens = list(prompt)
    for _ in range(STEPS):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :], model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0]


class Recording(TorchRunner):
    """Keeps the logits of every computed position, by (request, position)."""

    def launch(self, plan):
        inputs = self._builder.build(plan)
        rows = self.record_rows = []
        for chunk in plan.chunks:
            rows += [(chunk.seq.request, p) for p in range(chunk.start, chunk.end)]
        forward = self.model.forward

        def recorded(*args):
            hidden = forward(*args)
            for key, row in zip(rows, self.model.logits(hidden)):
                self.seen[key] = row
            return hidden

        self.model.forward = recorded
        try:
            return super().launch(plan)
        finally:
            self.model.forward = forward
            del inputs


@pytest.mark.parametrize("name", sorted(TINY))
def test_same_logits_and_tokens_as_transformers(name: str, tmp_path: Path) -> None:
    theirs = make(name, tmp_path)
    ours = build_model(tmp_path, dtype="fp32", device="cpu", max_seq_len=128).model
    vocab = ours.spec.vocab_size
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (1, 23, 7, 40)]
    pool = KvPool(ours.spec, 48, 8, torch.float32, torch.device("cpu"))
    cache = KvCache(48, 8)
    runner = Recording(ours, pool, 8, 128)
    runner.seen = {}
    # 16 tokens a step: the longer prompts are computed in chunks beside decoding sequences
    loop = EngineLoop(Scheduler(SchedulerConfig(max_num_tokens=16, max_batch_size=8), cache), runner, overlap=False)
    requests = [Request(p, SamplingParams(temperature=0, max_tokens=STEPS), STEPS) for p in prompts]
    for request in requests:
        loop.add(request)
    while loop.step():
        pass
    for request in requests:
        assert request.error is None
        tokens, logits = reference(theirs, request.prompt)
        own = torch.stack([runner.seen[request, p] for p in range(len(logits))])
        torch.testing.assert_close(own, logits, rtol=2e-4, atol=2e-4)
        assert request.sequences[0].output == tokens


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LamaForCausalLM"]}')
    with pytest.raises(ModelError, match="Did you mean 'LlamaForCausalLM'.*Qwen3MoeForCausalLM"):
        build_model(tmp_path, dtype="fp32", device="cpu", max_seq_len=8)
