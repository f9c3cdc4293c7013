"""The exact memory plan of an LLM: weights, cache, work space. Computed before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from venturi.core.errors import DeviceError
from venturi.llm.config import KvCacheConfig, SchedulerConfig
from venturi.llm.cpu_linear import packs
from venturi.llm.kv.pool import block_bytes
from venturi.llm.layers.linear import Linear
from venturi.llm.loader import Outline
from venturi.llm.long_chunks import MAX_KEYS
from venturi.llm.models.spec import DecoderSpec, MoeSpec
from venturi.llm.quant import is_quantized

CPU_SHARE = 0.25


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part on the device, and the cache in blocks. `str()` is a table."""

    device: str
    total: int
    free: int
    weights: int
    workspace: int
    cache: int
    num_blocks: int
    block_tokens: int
    host_blocks: int

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * self.block_tokens

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights, ""),
            ("work space of a step", self.workspace, ""),
            ("KV cache", self.cache, f"{self.num_blocks} blocks x {self.block_tokens} = {self.cache_tokens:,} tokens"),
            ("left", self.free - self.weights - self.workspace - self.cache, f"of {self.free / 2**30:.2f} GiB free"),
        ]
        lines = [f"memory plan, {self.device}"]
        lines += [f"  {name:22s}{count / 2**30:9.3f} GiB  {note}".rstrip() for name, count, note in rows]
        return "\n".join(lines)


def weight_bytes(outline: Outline, device: torch.device) -> int:
    """Bytes of all parameters once they are loaded, quantized and blocked."""
    model, total = outline.model, 0
    layers = {f"{name}.weight": (name, m) for name, m in model.named_modules() if isinstance(m, Linear)}
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and model.spec.tied and not packs(outline.dtype, device):
            continue
        narrow = name in layers and is_quantized(*layers[name], model, outline.quant)
        total += parameter.numel() * (1 if narrow else outline.dtype.itemsize)
    return total


def workspace_bytes(spec: DecoderSpec, scheduler: SchedulerConfig, dtype: torch.dtype) -> int:
    """An upper bound of the activations alive at once in the largest step, of the logits of its samples, and of the
    counts of tokens that penalties need."""
    widest = 0
    for layer in spec.layers:
        attention, mlp = layer.attention, layer.mlp
        heads = attention.num_heads * (attention.cache_k_dim + attention.head_dim)
        heads += 2 * attention.cache_heads * attention.cache_k_dim
        if isinstance(mlp, MoeSpec):
            widest = max(widest, mlp.top_k * max(3 * mlp.intermediate, mlp.intermediate + spec.hidden))
        else:
            widest = max(widest, 3 * mlp.intermediate)
        widest = max(widest, heads)
    step = scheduler.max_num_tokens * (4 * spec.hidden + widest) * dtype.itemsize
    logits = scheduler.max_batch_size * spec.vocab_size * 4 * 3
    counts = scheduler.max_batch_size * spec.vocab_size * 4
    return step + logits + counts


def gathered_bytes(spec: DecoderSpec, dtype: torch.dtype, max_seq_len: int) -> int:
    """Keys and values that a long chunk's attention has as rows, of one layer at a time."""
    row = max(2 * layer.attention.cache_heads * layer.attention.cache_k_dim for layer in spec.layers)
    return max(MAX_KEYS, max_seq_len) * row * dtype.itemsize


def plan_memory(
    spec: DecoderSpec, weights: int, dtype: torch.dtype, cache_dtype: torch.dtype, kv: KvCacheConfig,
    scheduler: SchedulerConfig, max_seq_len: int, device: torch.device,
) -> MemoryPlan:  # fmt: skip
    """Decide the size of the cache. Raises DeviceError, with the arithmetic, when not one block fits."""
    free, total = device_memory(device)
    per_block = block_bytes(spec, kv.tokens_per_block, cache_dtype)
    workspace = workspace_bytes(spec, scheduler, dtype)
    if device.type == "cuda":
        workspace += gathered_bytes(spec, dtype, max_seq_len)
    left = free - weights - workspace
    longest = -(-max_seq_len // kv.tokens_per_block)
    if kv.max_tokens is not None:
        blocks = -(-kv.max_tokens // kv.tokens_per_block)
    else:
        share = kv.free_gpu_memory_fraction if device.type == "cuda" else CPU_SHARE
        blocks = min(int(left * share) // per_block, longest * scheduler.max_batch_size)
    if blocks < 1 or blocks * per_block > left:
        raise DeviceError(
            f"the KV cache does not fit: {free / 2**30:.2f} GiB free - {weights / 2**30:.2f} weights"
            f" - {workspace / 2**30:.2f} work space = {left / 2**30:.2f} GiB, {max(blocks, 1)} blocks take"
            f" {max(blocks, 1) * per_block / 2**30:.2f} GiB; lower kv_cache max_tokens, scheduler max_num_tokens or"
            " max_batch_size, or free memory"
        )
    return MemoryPlan(
        str(device), total, free, weights, workspace, blocks * per_block, blocks, kv.tokens_per_block,
        kv.host_cache_size // per_block,
    )  # fmt: skip


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes. On the CPU, free is what the system can give without swapping."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    fields = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            fields[name] = int(value.split()[0]) * 1024
    return fields["MemAvailable"], fields["MemTotal"]
