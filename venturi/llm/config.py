"""Configuration of an `LLM`: cache, scheduler, CUDA graphs. Field names follow TensorRT-LLM's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from venturi.llm.settings import Settings


class KvCacheConfig(Settings):
    """The paged KV cache.

    Args:
        enable_block_reuse: keep finished prompts' blocks and reuse them for requests with the same prefix.
        enable_partial_reuse: also reuse a block that agrees only in its first tokens (it is copied).
        max_tokens: size of the cache in tokens; None: as many as fit.
        free_gpu_memory_fraction: share of the device memory left after weights and buffers, when max_tokens is None.
        host_cache_size: bytes of host memory for sequences that are swapped out; 0: they are recomputed.
        dtype: "auto" is the model's dtype; "fp8" stores e4m3; "int8" stores codes and a scale for each head of a token.
        tokens_per_block: a power of two.
    """

    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    max_tokens: int | None = Field(default=None, gt=0)
    free_gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1)
    host_cache_size: int = Field(default=0, ge=0)
    dtype: Literal["auto", "fp32", "fp16", "bf16", "fp8", "int8"] = "auto"
    tokens_per_block: int = 32

    @field_validator("tokens_per_block")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value < 1 or value & (value - 1):
            raise ValueError(f"tokens_per_block={value} is not a power of two")
        return value


class SchedulerConfig(Settings):
    """What a step may contain and who may enter.

    Args:
        capacity_scheduler_policy: GUARANTEED_NO_EVICT admits a request only when it can finish with the blocks that
            are left; MAX_UTILIZATION admits it when its prompt fits and pauses the newest when blocks run out.
        policy: order of waiting requests: "fcfs", "priority" (larger `priority` first), or "longest-prefix" (most
            cached tokens first).
        max_batch_size: sequences in a step. max_num_tokens: tokens in a step; longer prompts are computed in chunks.
        overlap: launch a step before the tokens of the step before it are known on the host (CUDA only).
    """

    capacity_scheduler_policy: Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"] = "GUARANTEED_NO_EVICT"
    policy: Literal["fcfs", "priority", "longest-prefix"] = "fcfs"
    max_batch_size: int = Field(default=256, gt=0)
    max_num_tokens: int = Field(default=8192, gt=0)
    overlap: bool = True


class CudaGraphConfig(Settings):
    """CUDA graphs of decode steps.

    Args:
        enabled: replay decode steps as graphs. enable_padding: a batch runs in the next larger captured size.
        lazy: capture a size when it is first needed; False: all of them at the start.
        batch_sizes: the sizes to capture; None: 1, 2, 4, then every 8 up to max_batch_size.
    """

    enabled: bool = True
    enable_padding: bool = True
    lazy: bool = True
    batch_sizes: list[int] | None = None
    max_batch_size: int = Field(default=256, gt=0)

    def sizes(self) -> list[int]:
        if self.batch_sizes is not None:
            return sorted(set(self.batch_sizes))
        return [n for n in (1, 2, 4, *range(8, self.max_batch_size + 1, 8)) if n <= self.max_batch_size]
