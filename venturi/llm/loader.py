"""From a model folder to a Decoder on a device: config, architecture, weights, preparation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from venturi.core.errors import ModelError, RequestError
from venturi.llm.cpu_linear import pack_for_cpu
from venturi.llm.layers.linear import Linear
from venturi.llm.models.config import Config
from venturi.llm.models.decoder import Decoder
from venturi.llm.models.registry import Architecture, architecture
from venturi.llm.quant import apply_quantization
from venturi.llm.saved import Saved, check_target, load_saved, read_mark, write_folder
from venturi.llm.weights import Progress, allocate, fill_random, load_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ALIASES = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class LoadedModel:
    """max_seq_len: tokens a sequence can have (prompt and output). end_ids: tokens that end a text."""

    model: Decoder
    config: Config
    dtype: torch.dtype
    max_seq_len: int
    end_ids: frozenset[int]


@dataclass(frozen=True)
class Outline:
    """A model on the meta device: everything about it is known, nothing is allocated."""

    folder: Path
    config: Config
    arch: Architecture
    model: Decoder
    dtype: torch.dtype
    max_seq_len: int
    quant: str | None = None
    saved: Saved | None = None

    def fill(self, device: torch.device, load_format: str = "auto", progress: Progress | None = None) -> LoadedModel:
        """Allocate, load ("auto") or make up ("dummy") the weights, prepare. Raises ModelError, RequestError."""
        if load_format not in ("auto", "dummy"):
            raise RequestError(f"load_format={load_format!r}; expected 'auto' or 'dummy'")
        self._fill_weights(device, load_format, progress)
        pack_for_cpu(self.model, self.dtype, device)
        self.model.prepare(self.max_seq_len, device)
        ends = end_ids(self.folder, self.config)
        return LoadedModel(self.model.eval(), self.config, self.dtype, self.max_seq_len, ends)

    def _fill_weights(self, device: torch.device, load_format: str, progress: Progress | None) -> None:
        if self.saved is not None and load_format == "auto":
            load_saved(self.model, self.saved, self.dtype, self.folder, device, progress)
        else:
            allocate(self.model, self.dtype, device)
            if load_format == "dummy":
                fill_random(self.model)
            else:
                load_weights(self.model, self.folder, self.arch, progress)
        apply_quantization(self.model, self.quant, self.dtype)

    def save(
        self, target: Path, load_format: str = "auto", progress: Progress | None = None, choices: Path | None = None
    ) -> int:
        """Load and quantize in host memory and write a folder of our own (`saved.py`), with a file of `choices` of
        kernels if there is one; returns the bytes of its tensors. The outline cannot be filled afterwards.

        Raises RequestError when `target` holds something, ModelError when it cannot be written.
        """
        check_target(target)
        self._fill_weights(torch.device("cpu"), load_format, progress)
        for module in self.model.modules():
            if isinstance(module, Linear):
                module.method.prepare(module)
        name = next(n for n, d in DTYPES.items() if d == self.dtype)
        return write_folder(self.model, Saved(name, self.quant), self.config.fields, self.folder, target, choices)


def outline_model(
    folder: Path, *, dtype: str = "auto", max_seq_len: int | None = None, overrides: dict[str, Any] | None = None,
    quant: str | None = None,
) -> Outline:  # fmt: skip
    """Read a Hugging Face folder's config and build its model on the meta device.

    Args:
        dtype: "auto" (the config's; bf16 if it names none), "fp32", "fp16", "bf16". overrides: fields of config.json
            to replace. quant: "fp8" for e4m3 weights, made while loading.

    Raises:
        ModelError: anything wrong with the config. RequestError: max_seq_len beyond the model.
    """
    config, saved = Config.read(folder, overrides), read_mark(folder)
    if saved is not None:
        dtype, quant = _as_saved(saved, dtype, quant)
    arch = architecture(config)
    with torch.device("meta"):
        model = Decoder(arch.spec(config))
    if max_seq_len is not None and max_seq_len > model.spec.max_positions:
        raise RequestError(
            f"max_seq_len={max_seq_len} exceeds the model's context of {model.spec.max_positions} tokens"
        )
    if quant not in (None, "fp8"):
        raise RequestError(f"quant={quant!r}; expected None or 'fp8'")
    length = max_seq_len or model.spec.max_positions
    return Outline(folder, config, arch, model, resolve_dtype(dtype, config), length, quant, saved)


def _as_saved(saved: Saved, dtype: str, quant: str | None) -> tuple[str, str | None]:
    if quant not in (None, saved.quant):
        raise RequestError(f"quant={quant!r}, but the folder was saved with quant={saved.quant!r}; use the original")
    if dtype != "auto" and _ALIASES.get(dtype, dtype) != saved.dtype:
        raise RequestError(f"dtype={dtype!r}, but the folder was saved in {saved.dtype}; use the original")
    return saved.dtype, saved.quant


def build_model(folder: Path, *, dtype: str, device: str, max_seq_len: int | None = None) -> LoadedModel:
    """Outline and fill in one call."""
    return outline_model(folder, dtype=dtype, max_seq_len=max_seq_len).fill(torch.device(device))


def resolve_dtype(dtype: str, config: Config) -> torch.dtype:
    if dtype == "auto":
        dtype = config.get("dtype", None) or config.get("torch_dtype", "bf16")
    name = _ALIASES.get(dtype, dtype)
    if name not in DTYPES:
        raise RequestError(f"dtype={dtype!r}; expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def end_ids(folder: Path, config: Config) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json; one or several."""
    path, found = folder / "generation_config.json", None
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as exc:
            raise ModelError(f"generation_config.json cannot be read: {exc}", where=str(path)) from exc
    found = config.get("eos_token_id", None) if found is None else found
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
