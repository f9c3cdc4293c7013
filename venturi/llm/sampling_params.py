"""How one request is sampled: `SamplingParams`, `GuidedDecodingParams`. Checked when they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from venturi.llm.settings import Settings

# (logits [vocab] fp32, token ids of prompt and output so far) -> logits; may edit in place and return None
LogitsProcessor = Callable[[Any, Sequence[int]], Any]


class GuidedDecodingParams(Settings):
    """The output must match one of: a JSON schema, any JSON object, a regex, a Lark (EBNF) grammar, a choice."""

    json_schema: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> GuidedDecodingParams:
        given = [n for n in ("json_schema", "json_object", "regex", "grammar", "choice") if getattr(self, n)]
        if len(given) != 1:
            names = "json, json_object, regex, grammar, choice"
            raise ValueError(f"exactly one of {names} must be given, got {given or 'none'}")
        return self


class SamplingParams(Settings):
    """Args:
    n: continuations returned. best_of: continuations computed, the n most likely are returned.
    max_tokens, min_tokens: length of a continuation.
    temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: probability mass; relative to the likeliest token.
    repetition_penalty: divides positive logits of tokens in prompt and output. presence_penalty, frequency_penalty:
        subtracted once, per occurrence in the output. no_repeat_ngram_size: no n-gram occurs twice.
    logit_bias: token id -> added to its logit. bad: texts that must not be generated; bad_token_ids likewise.
    stop: texts that end the continuation; stop_token_ids likewise. include_stop_str_in_output keeps the text.
    ignore_eos: go on after the model's end token.
    seed: the same tokens for the same request, whatever runs beside it, as long as its logits are the same.
    logprobs, prompt_logprobs: log probabilities (of the model, before penalties and temperature) of the chosen token
        and of that many likeliest ones, per generated and per prompt token.
    logits_processor: one or several functions (logits, token ids) -> logits.
    use_beam_search: the best_of (or n) likeliest continuations; length_penalty: score = logprob / length ** it;
        early_stopping: stop when that many continuations have ended.
    guided_decoding: see GuidedDecodingParams.
    truncate_prompt_tokens: keep that many tokens of the end of the prompt.
    """

    n: int = Field(default=1, ge=1, le=256)
    best_of: int | None = Field(default=None, ge=1, le=256)
    max_tokens: int = Field(default=32, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    bad: list[str] = Field(default_factory=list)
    bad_token_ids: list[int] = Field(default_factory=list)
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = Field(default=None, ge=0, le=100)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=100)
    logits_processor: LogitsProcessor | list[LogitsProcessor] | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False
    guided_decoding: GuidedDecodingParams | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1)
    add_special_tokens: bool = True
    skip_special_tokens: bool = True

    @field_validator("stop", "bad", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("stop: an empty text would stop at once")
        return value

    @model_validator(mode="after")
    def _agree(self) -> SamplingParams:
        wrong = []
        if self.best_of is not None and self.best_of < self.n:
            wrong.append(f"best_of={self.best_of} is smaller than n={self.n}")
        if self.min_tokens > self.max_tokens:
            wrong.append(f"min_tokens={self.min_tokens} is larger than max_tokens={self.max_tokens}")
        for name in ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty"):
            if not abs(getattr(self, name)) < float("inf"):
                wrong.append(f"{name}={getattr(self, name)} is not finite")
        if self.use_beam_search and self.guided_decoding is not None:
            wrong.append("guided_decoding cannot be combined with use_beam_search")
        if self.temperature == 0 and self.width > 1 and not self.use_beam_search:
            wrong.append(f"temperature=0 gives the same text {self.width} times; use n=1, sampling or use_beam_search")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def width(self) -> int:
        """Continuations computed side by side."""
        return self.best_of or self.n

    @property
    def processors(self) -> list[LogitsProcessor]:
        if self.logits_processor is None:
            return []
        return self.logits_processor if isinstance(self.logits_processor, list) else [self.logits_processor]

    @property
    def penalizes(self) -> bool:
        """Logits depend on how often the sequence has a token, which is counted on the device."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def needs_history(self) -> bool:
        """The next token's logits depend on the tokens so far: they must be known on the host first."""
        return bool(
            self.no_repeat_ngram_size or self.bad or self.processors or self.guided_decoding or self.use_beam_search
        )
