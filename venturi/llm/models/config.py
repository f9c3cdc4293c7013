"""A model folder's config.json, read with defaults and with errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from venturi.core.errors import ModelError
from venturi.llm.models.spec import RotarySpec


class Config:
    """The fields of a config.json. `where` names the file in errors."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    @classmethod
    def read(cls, folder: Path, overrides: dict[str, Any] | None = None) -> Config:
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no config.json; expected a Hugging Face model folder", where=str(path))
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise ModelError(f"config.json cannot be read: {exc}", where=str(path)) from exc
        if not isinstance(fields, dict):
            raise ModelError(f"config.json holds a {type(fields).__name__}, expected an object", where=str(path))
        return cls(fields | (overrides or {}), str(path))

    def get(self, name: str, default: Any) -> Any:
        """The field, or the default where it is missing or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def need(self, *names: str) -> Any:
        """The first of these fields that is present."""
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        raise ModelError(f"config.json lacks {' or '.join(repr(n) for n in names)}", where=self.where)

    def integer(self, *names: str) -> int:
        value = self.need(*names)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{names[0]}={value!r}; expected a positive integer", where=self.where)
        return value

    @property
    def architecture(self) -> str:
        names = self.fields.get("architectures") or ["?"]
        return str(names[0])

    @property
    def head_dim(self) -> int:
        return int(self.get("head_dim", 0)) or self.integer("hidden_size") // self.integer("num_attention_heads")

    def rotary(self, dim: int, kind: str | None = None, *, interleaved: bool = False) -> RotarySpec:
        """The rope record of old (rope_theta, rope_scaling) and new (rope_parameters, maybe per layer type) configs."""
        scaling = self.get("rope_parameters", None) or self.get("rope_scaling", None) or {}
        if kind is not None and isinstance(scaling.get(kind), dict):
            scaling = scaling[kind]
        theta = scaling.get("rope_theta") or self.get("rope_theta", 10000.0)
        partial = scaling.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)
        if "original_max_position_embeddings" not in scaling and "original_max_position_embeddings" in self.fields:
            scaling = scaling | {"original_max_position_embeddings": self.fields["original_max_position_embeddings"]}
        return RotarySpec(int(dim * partial), float(theta), self.max_positions, dict(scaling), interleaved)

    @property
    def max_positions(self) -> int:
        return self.integer("max_position_embeddings", "n_positions")

    def windows(self) -> list[int | None]:
        """The sliding window of every layer: from layer_types where given, else from sliding_window."""
        layers, window = self.integer("num_hidden_layers"), self.get("sliding_window", None)
        kinds = self.fields.get("layer_types")
        if kinds:
            return [window if kind == "sliding_attention" else None for kind in kinds]
        return [window] * layers
