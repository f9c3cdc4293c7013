"""Which sequences of a step have so many new tokens that their attention goes to cuDNN, and its inputs."""

from __future__ import annotations

import numpy as np
import torch

from venturi.kernels.attention import AttentionKind, LongChunks
from venturi.kernels.cudnn_prefill import fits
from venturi.llm.models.spec import DecoderSpec
from venturi.llm.staging import Staging
from venturi.llm.step_inputs import Ints, StepInputs

MIN_QUERIES = 512
MAX_KEYS = 1 << 16


def refusal(spec: DecoderSpec, dtype: torch.dtype, cache: torch.dtype, device: torch.device) -> str | None:
    """Why no chunk of this model goes to cuDNN, a reason of the first layer that has one; None when long ones do."""
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "before sm_90 our own kernel is as fast"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the model computes in {str(dtype).removeprefix('torch.')}"
    if cache == torch.int8:
        return "the cache is int8"
    for layer in spec.layers:
        a = layer.attention
        kind = AttentionKind(a.scale, a.window, a.softcap)
        v_dim = a.head_dim if a.mla is None else a.mla.kv_rank
        reason = fits(a.cache_k_dim, v_dim, kind, a.sinks)
        if reason:
            return reason
    return None


def group(inputs: StepInputs) -> list[list[int]]:
    """Long sequences in order; the keys of a group are at most MAX_KEYS, unless it is one sequence."""
    counts = np.diff(inputs.query_starts)
    groups: list[list[int]] = []
    keys = 0
    for i in np.flatnonzero(counts >= MIN_QUERIES).tolist():
        keys += int(inputs.seq_lens[i])
        if not groups or keys > MAX_KEYS:
            groups.append([])
            keys = int(inputs.seq_lens[i])
        groups[-1].append(i)
    return groups


def upload(inputs: StepInputs, sequences: list[int], block_tokens: int, staging: Staging) -> LongChunks:
    """The group's lengths, offsets and blocks on the device."""
    keys = inputs.seq_lens[sequences]
    counts = np.diff(inputs.query_starts)[sequences]
    blocks = -(-keys // block_tokens)
    first_keys = np.concatenate(([0], np.cumsum(blocks))) * block_tokens
    last = inputs.query_starts[sequences[-1] + 1]
    first_queries: Ints = np.append(inputs.query_starts[sequences], last)
    ids = np.concatenate([inputs.tables[i, :n] for i, n in zip(sequences, blocks)])
    fields = staging.upload(first_queries, first_keys, counts, keys, ids)
    n = len(sequences)
    starts = fields[0].new_empty((2, n + 1))
    starts[0], starts[1] = fields[0], fields[1]
    lengths = fields[2].new_empty((2, n)).int()
    lengths[0], lengths[1] = fields[2], fields[3]
    return LongChunks(
        starts, lengths, fields[4].int(), _size_above(int(counts.max())), _size_above(int(first_keys[-1]))
    )


def _size_above(length: int) -> int:
    """The power of two from 1,024 on, so that few plans serve all lengths."""
    return max(1024, 1 << (length - 1).bit_length())
