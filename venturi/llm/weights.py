"""Weights from a Hugging Face folder of safetensors into a Decoder: streaming, strict, on any device.

Tensor by tensor: rename, find the place (a whole parameter, some rows of it, one expert), copy. At the end every row
of every parameter must have come from exactly one tensor; what is missing and what is unknown is listed whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from venturi.core.errors import ModelError
from venturi.llm.layers.feed_forward import Experts
from venturi.llm.layers.linear import Linear
from venturi.llm.models.decoder import Decoder
from venturi.llm.models.registry import Architecture

Progress = Callable[[int, int], None]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor goes: an index into a parameter."""

    name: str
    parameter: nn.Parameter
    index: Any = ...

    @property
    def target(self) -> Tensor:
        return self.parameter.data[self.index]


def allocate(model: Decoder, dtype: torch.dtype, device: torch.device) -> None:
    """Give the parameters of a model built on the meta device memory of their own (not initialized)."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fresh = torch.empty(parameter.shape, dtype=kept_dtype(name, dtype), device=device)
            setattr(module, name, nn.Parameter(fresh, requires_grad=False))


def kept_dtype(leaf: str, dtype: torch.dtype) -> torch.dtype:
    """Of a parameter of this name in a model of `dtype`."""
    return torch.float32 if leaf == "correction" else dtype


def fill_random(model: Decoder, seed: int = 0) -> None:
    """Random weights (load_format="dummy"): matrices N(0, 1 / inputs), norms 1, biases 0."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator(parameter.device).manual_seed(seed * 1_000_003 + number)
        if parameter.ndim == 1:
            parameter.data.fill_(1.0 if name.endswith("norm.weight") and model.spec.norm != "rms+1" else 0.0)
        else:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def load_weights(model: Decoder, folder: Path, arch: Architecture, progress: Progress | None = None) -> None:
    """Fill all parameters of an allocated model.

    Raises:
        ModelError: no or missing or corrupt files; tensors of wrong shape; unknown or missing tensors (all listed).
    """
    places, loaded, unknown = _places(model), dict[str, int](), []
    files = shards(folder)
    for number, path in enumerate(files):
        for key, tensor in tensors_of(path):
            name = _rename(key, arch, len(model.spec.layers))
            if name is None or (name == "lm_head.weight" and model.spec.tied):
                continue
            place = places.get(name)
            if place is None:
                unknown.append(key)
                continue
            value = tensor if arch.transform is None else arch.transform(name, tensor)
            if value.shape != place.target.shape:
                raise ModelError(
                    f"tensor {key!r} has shape {list(value.shape)}, the config asks for {list(place.target.shape)}",
                    where=str(path),
                )
            place.target.copy_(value)
            loaded[place.name] = loaded.get(place.name, 0) + value.numel()
        if progress is not None:
            progress(number + 1, len(files))
    _check_complete(model, loaded, unknown, folder)


def _check_complete(model: Decoder, loaded: dict[str, int], unknown: list[str], folder: Path) -> None:
    expected = {name: p.numel() for name, p in model.named_parameters()}
    if model.spec.tied:
        expected.pop("lm_head.weight", None)
    missing = [name for name, count in expected.items() if loaded.get(name, 0) < count]
    twice = [name for name, count in loaded.items() if count > expected.get(name, 0)]
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:20])}{' ...' if len(names) > 20 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("given twice", twice))
        if names
    ]
    if problems:
        raise ModelError(f"weights and config.json disagree; tensors {'; '.join(problems)}", where=str(folder))


def _places(model: Decoder) -> dict[str, Place]:
    places = {name: Place(name, parameter) for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            parent = path.rpartition(".")[0]
            for piece in module.pieces:
                for leaf, parameter in module.named_parameters(recurse=False):
                    if piece:
                        places[f"{parent}.{piece}.{leaf}"] = Place(f"{path}.{leaf}", parameter, module.rows(piece))
        elif isinstance(module, Experts):
            rows = module.spec.intermediate
            for e in range(module.spec.num_experts):
                gate_up = f"{path}.gate_up"
                places[f"{path}.{e}.gate_proj.weight"] = Place(gate_up, module.gate_up, (e, slice(0, rows)))
                places[f"{path}.{e}.up_proj.weight"] = Place(gate_up, module.gate_up, (e, slice(rows, 2 * rows)))
                places[f"{path}.{e}.down_proj.weight"] = Place(f"{path}.down", module.down, e)
    return places


def _rename(key: str, arch: Architecture, num_layers: int) -> str | None:
    """Our name of a checkpoint tensor; None for one that carries nothing we need."""
    if any(re.search(pattern, key) for pattern in arch.ignored):
        return None
    name = key.removeprefix("model.")
    for pattern, replacement in arch.renames:
        name = re.sub(pattern, replacement, name)
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= num_layers:
        return None
    return name


def shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as exc:
            raise ModelError(f"the shard index cannot be read: {exc!r}", where=str(index)) from exc
        if any(Path(str(name)).name != name for name in names):
            raise ModelError("the shard index names files outside its folder", where=str(index))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"missing shards: {', '.join(missing)}", where=str(folder))
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        hint = "; convert the .bin files to safetensors" if list(folder.glob("*.bin")) else ""
        raise ModelError(f"no *.safetensors files{hint}", where=str(folder))
    return files


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError) as exc:
        raise ModelError(f"the shard cannot be read: {exc}", where=str(path)) from exc
