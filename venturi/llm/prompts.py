"""From what callers give (text, token ids, messages, records of them) to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from venturi.core.errors import RequestError
from venturi.llm.sampling_params import SamplingParams
from venturi.llm.tokenizer import TextTokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
_FORMS = "text, a list of token ids, a list of messages, or {'prompt' | 'prompt_token_ids' | 'messages': ...}"


def is_one_prompt(value: Any) -> bool:
    """True for a prompt, False for a list of prompts."""
    if isinstance(value, (str, Mapping)):
        return True
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise RequestError(f"a prompt is {_FORMS}; got {type(value).__name__}")
    first = value[0] if value else None
    return isinstance(first, int) or (isinstance(first, Mapping) and "role" in first)


def tokens_of(
    prompt: Any, params: SamplingParams, tokenizer: TextTokenizer | None, vocab_size: int
) -> tuple[list[int], str | None]:
    """(token ids, text if there was one) of a prompt. Raises RequestError for anything that is no prompt."""
    text: str | None = None
    special = params.add_special_tokens
    if isinstance(prompt, Mapping):
        known = [key for key in ("prompt", "prompt_token_ids", "messages") if key in prompt]
        if len(known) != 1 or len(prompt) != 1:
            raise RequestError(f"a prompt is {_FORMS}; got a record of {', '.join(map(repr, prompt))}")
        prompt = prompt[known[0]]
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt):
        text, special = _need(tokenizer).apply_chat_template([dict(m) for m in prompt]), False
    if text is not None:
        tokens = _need(tokenizer).encode(text, add_special_tokens=special)
    elif isinstance(prompt, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        tokens = list(prompt)
    else:
        raise RequestError(f"a prompt is {_FORMS}; got {type(prompt).__name__}")
    if not tokens:
        raise RequestError("the prompt is empty: there is nothing to continue")
    wrong = [t for t in tokens if not 0 <= t < vocab_size]
    if wrong:
        raise RequestError(f"token ids {wrong[:5]} are outside the vocabulary 0..{vocab_size - 1}")
    if params.truncate_prompt_tokens is not None:
        tokens = tokens[-params.truncate_prompt_tokens :]
    return tokens, text


def _need(tokenizer: TextTokenizer | None) -> TextTokenizer:
    if tokenizer is None:
        raise RequestError("this LLM has no tokenizer; give the prompt as token ids")
    return tokenizer
