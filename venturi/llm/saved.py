"""Model folders of our own: weights joined and quantized as a Decoder keeps them, so that loading only maps them.

config.json and the tokenizer's files are the model's; `venturi.json` says how the weights were made; the shards hold
our parameters under our names; `tuned/` holds choices of kernels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from venturi.core.errors import ModelError, RequestError
from venturi.llm.layers.linear import Linear
from venturi.llm.models.decoder import Decoder
from venturi.llm.quant import is_quantized
from venturi.llm.weights import INDEX, Progress, kept_dtype, shards, tensors_of

MARK, TUNED = "venturi.json", "tuned"
FORMAT = 1
SHARD_BYTES = 5 << 30
ALIGNED = 64
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """How a folder's weights were made: `dtype` "bf16", ..., `quant` None or "fp8"."""

    dtype: str
    quant: str | None
    format: int = FORMAT


def read_mark(folder: Path) -> Saved | None:
    """None for a folder that is not of our own. Raises ModelError for a mark that cannot be read or is newer."""
    path = folder / MARK
    if not path.is_file():
        return None
    try:
        found = Saved(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise ModelError(f"{MARK} cannot be read: {exc}; save the model again", where=str(path)) from exc
    if found.dtype not in ("fp32", "fp16", "bf16") or found.quant not in (None, "fp8"):
        raise ModelError(f"{MARK} says dtype {found.dtype!r} and quant {found.quant!r}", where=str(path))
    if found.format != FORMAT:
        raise ModelError(f"{MARK} has format {found.format}, this version reads {FORMAT}", where=str(path))
    return found


def check_target(target: Path) -> None:
    """Raises RequestError when `target` holds something."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"{target} exists and is not an empty folder; choose another, nothing is overwritten")


def write_folder(
    model: Decoder, mark: Saved, config: dict[str, Any], source: Path, target: Path, choices: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:  # fmt: skip
    """Write a loaded, quantized model whose weights nobody has packed; returns the bytes of its tensors.

    All or nothing: a folder beside `target` is filled and takes its name at the end. Raises ModelError when it cannot
    be written.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        total = _write_tensors(dict(_kept(model)), partial, shard_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        if choices is not None and choices.is_file():
            (partial / TUNED).mkdir()
            shutil.copyfile(choices, partial / TUNED / choices.name)
        (partial / MARK).write_text(json.dumps(asdict(mark)), encoding="utf-8")
        if target.exists():
            target.rmdir()
        partial.replace(target)
    except OSError as exc:
        raise ModelError(f"the model cannot be saved: {exc}", where=str(target)) from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _kept(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model by our name; a tied head is the embedding."""
    for name, parameter in model.named_parameters():
        if not (name == "lm_head.weight" and model.spec.tied):
            yield name, parameter.data
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.scales is not None:
            yield f"{name}.scales", module.scales


def _write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> int:
    groups: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor.contiguous()
        filled, total = filled + size, total + size
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups):
        save_file(group, folder / name, metadata={"format": "pt"})
    places = {tensor: name for name, group in zip(names, groups) for tensor in group}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def load_saved(
    model: Decoder,
    mark: Saved,
    dtype: torch.dtype,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
) -> None:
    """Give a model on the meta device the tensors of a folder of our own.

    On the CPU they stay in the mapped files where they lie as memory of torch's own would: products of others may be
    slower, and round otherwise.

    Raises ModelError: corrupt or missing shards, tensors that are missing, unknown or of another shape or type.
    """
    wanted = _expected(model, mark.quant, dtype)
    unknown: list[str] = []
    files = shards(folder)
    for number, path in enumerate(files):
        for name, tensor in tensors_of(path):
            if name not in wanted:
                unknown.append(name)
                continue
            shape, kind = wanted.pop(name)
            if (tensor.shape, tensor.dtype) != (shape, kind):
                got, expected = (
                    f"{str(k).removeprefix('torch.')}{list(s)}"
                    for s, k in ((tensor.shape, tensor.dtype), (shape, kind))
                )
                raise ModelError(f"tensor {name!r} is {got}, expected {expected}", where=str(path))
            own = tensor.to(device)
            _place(model, name, own.clone() if device.type == "cpu" and own.data_ptr() % ALIGNED else own)
        if progress is not None:
            progress(number + 1, len(files))
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:20])}{' ...' if len(names) > 20 else ''}"
        for what, names in (("missing", list(wanted)), ("unknown", unknown))
        if names
    ]
    if problems:
        raise ModelError(f"weights and config.json disagree; tensors {'; '.join(problems)}", where=str(folder))


def _expected(model: Decoder, quant: str | None, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and is_quantized(n, m, model, quant)}
    found = {}
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and model.spec.tied:
            continue
        narrow = name.endswith(".weight") and name.removesuffix(".weight") in layers
        kind = torch.float8_e4m3fn if narrow else kept_dtype(name.rpartition(".")[2], dtype)
        found[name] = parameter.shape, kind
    return found | {f"{n}.scales": (torch.Size([m.out_features]), torch.float32) for n, m in layers.items()}


def _place(model: Decoder, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, leaf, tensor if leaf == "scales" else nn.Parameter(tensor, requires_grad=False))
