"""Rotation, cache and attention of a step on the CPU by generated code."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from venturi.backends.cpu.codegen.element import OF_TORCH
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.codegen.paged import PagedSpec, emit_attend, emit_rotate
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.walker import Job
from venturi.core.errors import InternalError
from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.llm.models.spec import AttentionSpec

# Longer pieces of prompts go to torch, whose kernel takes many queries through a key at once.
MOST_QUERIES = 256


class GeneratedAttention:
    """Serves one step after the other; not thread-safe. `always`: what it cannot do is an error, and no chunk is too
    long (a token's result does not depend on the others' then)."""

    def __init__(self, isa: Isa, *, always: bool = False) -> None:
        self._isa, self._always = isa, always
        self._jobs: dict[PagedSpec, Job] = {}
        self._queries = torch.empty(0)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, interleaved: bool, k_cache: Tensor,
        v_cache: Tensor, batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """As `rotated_attention`; None for what code is not generated for."""
        spec = self._spec(q, k, v, angles, k_cache, v_cache, kind, sinks)
        if spec is None or (interleaved and spec.pairs):
            if self._always:
                raise InternalError(f"no code for attention of {spec or tuple(q.shape)}, which was promised")
            return None
        if batch.max_query > MOST_QUERIES and not self._always:
            return None
        tokens, out = len(q), q.new_empty(len(q), spec.heads, spec.v_dim)
        if self._queries.numel() < q.numel():
            self._queries = torch.empty(q.numel())
        job = self._jobs.get(spec) or self._job(spec)
        rows, logits = _rows(batch), None if sinks is None else sinks.float().contiguous()
        turn = 0 if angles is None else angles.data_ptr()
        job.words(0)[:] = [
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0), turn,
            batch.positions.data_ptr(), batch.slots.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            self._queries.data_ptr(),
        ]  # fmt: skip
        job.words(1)[:] = [
            self._queries.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), batch.block_tables.data_ptr(),
            batch.block_tables.stride(0), rows.data_ptr(), batch.positions.data_ptr(), out.data_ptr(),
            0 if logits is None else logits.data_ptr(),
        ]  # fmt: skip
        job.set_tasks(0, tokens)
        job.set_tasks(1, tokens * spec.parts)
        job.run()
        return out

    def _spec(
        self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, k_cache: Tensor, v_cache: Tensor,
        kind: AttentionKind, sinks: Tensor | None,
    ) -> PagedSpec | None:  # fmt: skip
        element, cache = OF_TORCH.get(q.dtype), OF_TORCH.get(k_cache.dtype)
        if element is None or cache is None or element.limits or cache.limits:
            return None
        if not (k_cache.is_contiguous() and v_cache.is_contiguous()) or (
            angles is not None and not angles.is_contiguous()
        ):
            return None
        if not all(x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in (q, k, v)) or k.dtype != q.dtype:
            return None
        pairs = 0 if angles is None else angles.shape[1] // 2
        spec = PagedSpec(
            q.shape[1], k.shape[1], q.shape[2], v.shape[2], pairs, k_cache.shape[1], element, cache, kind.scale,
            kind.window, kind.softcap, sinks is not None,
        )  # fmt: skip
        return spec if spec.fits(self._isa) else None

    def _job(self, spec: PagedSpec) -> Job:
        jit = host_jit(self._isa)
        rotate = jit.address(f"rotate {spec!r}", lambda: emit_rotate(self._isa, spec))
        attend = jit.address(f"attend {spec!r}", lambda: emit_attend(self._isa, spec))
        job = self._jobs[spec] = Job([(rotate, [0] * 12, 0), (attend, [0] * 9, 0)])
        return job


def _rows(batch: AttentionBatch) -> Tensor:
    """The block table of every token, made once a step."""
    found = batch.workspace.get("token_rows")
    if found is None:
        counts = np.diff(np.asarray(batch.host[0]))
        found = torch.from_numpy(np.repeat(batch.table_rows.numpy().astype(np.int64), counts))
        batch.workspace["token_rows"] = found
    return found


def generated_attention(*, always: bool = False) -> GeneratedAttention | None:
    """None where no code can be generated for this CPU."""
    isa = host()
    return GeneratedAttention(isa, always=always) if isinstance(isa, Isa) else None


def serves(spec: AttentionSpec, dtype: torch.dtype, k_cache: Tensor) -> bool:
    """Whether there is code for a layer's attention over this cache."""
    isa, rotary = host(), spec.rotary
    element, cache = OF_TORCH.get(dtype), OF_TORCH.get(k_cache.dtype)
    if not isinstance(isa, Isa) or spec.mla is not None or element is None or cache is None:
        return False
    if element.limits or cache.limits or (rotary is not None and rotary.interleaved):
        return False
    pairs = 0 if rotary is None else rotary.dim // 2
    heads = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim
    return PagedSpec(*heads, pairs, k_cache.shape[1], element, cache, spec.scale).fits(isa)
