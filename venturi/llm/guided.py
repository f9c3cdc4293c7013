"""Guided decoding: which tokens a grammar allows next, through the llguidance library."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from venturi.core.errors import ModelError, RequestError
from venturi.llm.sampling_params import GuidedDecodingParams
from venturi.llm.tokenizer import TextTokenizer

COMPACT = {"whitespace_flexible": False}  # models left free write spaces for ever


class GuideFactory:
    """Makes guides for one tokenizer. Raises ModelError when llguidance is not installed."""

    def __init__(self, tokenizer: TextTokenizer, end_ids: frozenset[int], vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError as exc:
            raise ModelError("guided decoding needs the 'llguidance' package: pip install venturi[llm]") from exc
        self._lib: Any = llguidance
        end = sorted(end_ids) or ([tokenizer.end_id] if tokenizer.end_id is not None else None)
        text = tokenizer.inner.to_str()
        self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=end)

    def make(self, params: GuidedDecodingParams) -> Guide:
        """A guide at the start of its grammar. Raises RequestError for a grammar that is wrong."""
        matcher = self._lib.LLMatcher
        try:
            if params.json_schema is not None:
                schema = params.json_schema
                text = schema if isinstance(schema, str) else json.dumps(schema)
                grammar = matcher.grammar_from_json_schema(text, defaults=COMPACT)
            elif params.json_object:
                grammar = matcher.grammar_from_json_schema('{"type": "object"}', defaults=COMPACT)
            elif params.regex is not None:
                grammar = matcher.grammar_from_regex(params.regex)
            elif params.choice is not None:
                options = " | ".join(json.dumps(option) for option in params.choice)
                grammar = matcher.grammar_from_lark(f"start: {options}")
            else:
                grammar = matcher.grammar_from_lark(params.grammar)
            found = matcher(self._tokenizer, grammar)
        except Exception as exc:
            raise RequestError(f"guided_decoding: the grammar cannot be used: {exc}") from exc
        if found.is_error():
            raise RequestError(f"guided_decoding: the grammar cannot be used: {found.get_error()}")
        return Guide(found)


class Guide:
    """The state of one sequence in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Guide:
        return Guide(self._matcher.deep_copy())

    def allowed(self, vocab_size: int) -> NDArray[np.bool_]:
        """[vocab_size], True for tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RequestError(f"guided_decoding: {self._matcher.get_error()}")
        mask = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        if len(mask) < vocab_size:
            mask = np.pad(mask, (0, vocab_size - len(mask)))
        if not mask.any():
            raise RequestError("guided_decoding: the grammar allows no token here; it cannot be satisfied")
        return mask

    def accept(self, token: int) -> bool:
        """Take a token; True when the text is complete and nothing may follow."""
        if not self._matcher.consume_token(token):
            raise RequestError(f"guided_decoding: token {token} does not fit: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())
