"""Text to tokens and back: a folder's tokenizer.json through the `tokenizers` library, and its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from venturi.core.errors import ModelError, RequestError

Message = dict[str, Any]


class TextTokenizer:
    """A tokenizer.json with its chat template. Thread-safe.

    Raises:
        ModelError: no or broken tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json; give prompts as token ids or pass tokenizer=",
                where=str(path),
            )
        try:
            from tokenizers import Tokenizer
        except ImportError as exc:
            raise ModelError("text prompts need the 'tokenizers' package: pip install venturi[llm]") from exc
        try:
            self.inner: Any = Tokenizer.from_file(str(path))
        except Exception as exc:
            raise ModelError(f"tokenizer.json cannot be read: {exc}", where=str(path)) from exc
        self.folder = folder
        self._config = _read_json(folder / "tokenizer_config.json")
        self._template: Any = None

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size())

    @property
    def end_id(self) -> int | None:
        """The id of eos_token, if the folder names one."""
        token = _token_text(self._config.get("eos_token"))
        return None if token is None else self.inner.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: list[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.inner.decode(tokens, skip_special_tokens=skip_special_tokens))

    def stream(self) -> TextStream:
        return TextStream(self)

    def apply_chat_template(self, messages: list[Message], **variables: Any) -> str:
        """The prompt text of a conversation, by the folder's Jinja template, run in Jinja's sandbox."""
        if self._template is None:
            self._template = self._compile_template()
        bos, eos = (_token_text(self._config.get(k)) or "" for k in ("bos_token", "eos_token"))
        try:
            return str(
                self._template.render(
                    messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos, **variables
                )
            )
        except Exception as exc:
            raise RequestError(f"the chat template refused the messages: {exc}") from exc

    def _compile_template(self) -> Any:
        path = self.folder / "chat_template.jinja"
        text = path.read_text(encoding="utf-8") if path.is_file() else self._config.get("chat_template")
        if isinstance(text, list):
            text = next((t["template"] for t in text if t.get("name") == "default"), None)
        if not text:
            raise RequestError("this model has no chat template; give the prompt as text", where=str(self.folder))
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as exc:
            raise ModelError("chat prompts need the 'jinja2' package: pip install venturi[llm]") from exc
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            return environment.from_string(str(text))
        except Exception as exc:
            raise ModelError(f"the chat template is broken: {exc}", where=str(self.folder)) from exc


class TextStream:
    """Tokens in, text out, piece by piece; a character that spans tokens comes when it is complete."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self.tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        return self._stream.step(self.tokenizer.inner, token) or ""


class StopScan:
    """Finds the first of several texts in a growing text."""

    def __init__(self, stream: TextStream, stops: list[str]) -> None:
        self._stream, self._stops = stream, stops
        self._tail, self._keep = "", max(map(len, stops)) - 1

    def fresh(self) -> StopScan:
        """The same scan, at its start."""
        return StopScan(self._stream.tokenizer.stream(), self._stops)

    def add(self, token: int) -> str | None:
        """The stop text that the newest token completed, if any."""
        piece = self._stream.add(token)
        if not piece:
            return None
        text = self._tail + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        self._tail = text[len(text) - self._keep :] if self._keep else ""
        return min(found)[1] if found else None


def _raise_template_error(message: str) -> None:
    raise ValueError(message)


def _token_text(value: Any) -> str | None:
    """Special tokens are written as text or as a record with its text under "content"."""
    return value.get("content") if isinstance(value, dict) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ModelError(f"{path.name} cannot be read: {exc}", where=str(path)) from exc
    return fields if isinstance(fields, dict) else {}
