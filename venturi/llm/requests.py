"""From a prompt and its parameters to a `Request` that the loop can run; every check of one request is here."""

from __future__ import annotations

import random
from typing import Any

from venturi.core.errors import RequestError
from venturi.llm.beam import BeamSearch
from venturi.llm.guided import GuideFactory
from venturi.llm.prompts import tokens_of
from venturi.llm.request import Request
from venturi.llm.sampling_params import SamplingParams
from venturi.llm.tokenizer import StopScan, TextTokenizer


class RequestFactory:
    """Makes requests for one model. Thread-safe."""

    def __init__(
        self, tokenizer: TextTokenizer | None, vocab_size: int, max_seq_len: int, end_ids: frozenset[int], seed: int
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.end_ids = end_ids
        if not end_ids and tokenizer is not None and tokenizer.end_id is not None:
            self.end_ids = frozenset({tokenizer.end_id})
        self._random = random.Random(seed)
        self._guides: GuideFactory | None = None

    def make(self, prompt: Any, params: SamplingParams, priority: int) -> tuple[Request, str | None]:
        """The request and the prompt's text, if it has one. Raises RequestError."""
        tokens, text = tokens_of(prompt, params, self.tokenizer, self.vocab_size)
        room = self.max_seq_len - len(tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.max_seq_len}, one of them new;"
                " shorten it or set truncate_prompt_tokens"
            )
        self._check_ids(params)
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_ids)
        seed = self._random.getrandbits(62) if params.seed is None else params.seed
        request = Request(tokens, params, min(params.max_tokens, room), stops, priority=priority, seed=seed)
        request.bad_words = [self._encode_word(word) for word in params.bad]
        if params.use_beam_search:
            request.beam = BeamSearch(request)
        first = request.sequences[0]
        if params.stop:
            first.text_scan = StopScan(self._need_tokenizer("stop texts").stream(), params.stop)
        if params.guided_decoding is not None:
            first.guide = self._guide_factory().make(params.guided_decoding)
        return request, text

    def _check_ids(self, params: SamplingParams) -> None:
        for name in ("stop_token_ids", "bad_token_ids", "logit_bias"):
            wrong = [t for t in getattr(params, name) if not 0 <= t < self.vocab_size]
            if wrong:
                raise RequestError(f"{name}: ids {wrong[:5]} are outside the vocabulary 0..{self.vocab_size - 1}")
        if params.use_beam_search and params.stop:
            raise RequestError("stop texts cannot be combined with use_beam_search; use stop_token_ids")

    def _encode_word(self, word: str) -> list[int]:
        tokens = self._need_tokenizer("bad words").encode(word, add_special_tokens=False)
        if not tokens:
            raise RequestError(f"bad: {word!r} has no tokens")
        return tokens

    def _guide_factory(self) -> GuideFactory:
        if self._guides is None:
            tokenizer = self._need_tokenizer("guided_decoding")
            self._guides = GuideFactory(tokenizer, self.end_ids, self.vocab_size)
        return self._guides

    def _need_tokenizer(self, what: str) -> TextTokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} need a tokenizer, and this LLM has none")
        return self.tokenizer
