"""A product of numbers, made bytes of by their range at run time, and constant weights of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from venturi.backends.base import OUT, SCRATCH, Operand, Phase, Routine
from venturi.backends.cpu.codegen import dynamic
from venturi.backends.cpu.codegen.activation import Post
from venturi.backends.cpu.codegen.element import FLOAT, U8
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa
from venturi.backends.cpu.codegen.matrix import MatrixSpec, Schedule, emit_matrix, pack_matrix
from venturi.backends.cpu.codegen.units import BLOCK
from venturi.backends.cpu.epilogue import Epilogue
from venturi.backends.cpu.native.contraction import post_of
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.matrix import PANEL_BYTES, group_rows
from venturi.backends.cpu.native.memory import packed_by_pieces

T = torch.Tensor


class DynamicMatrix:
    """`weight` is [out, in, 1, 1] in s8, `scales` [out] make its numbers. Thread-safe."""

    def __init__(
        self, isa: Isa, weight: T, scales: T, bias: T | None, epilogue: Epilogue, config: Mapping[str, Any]
    ) -> None:
        post = post_of(epilogue)
        assert isinstance(post, Post)
        self._isa, self._config, self._post, self._residual = isa, config, post, epilogue.residual
        self._weight = packed_by_pieces(weight, BLOCK, pack_matrix)
        self._scales = scales.float().contiguous()
        self._sums = weight.flatten(1).sum(1, dtype=torch.int32).contiguous()
        self._bias = None if bias is None else bias.float().contiguous()
        self._numbers = torch.zeros(8)

    def routine(
        self, geometry: ConvGeometry, batch: int, shape: Sequence[int], layouts: Sequence[torch.memory_format]
    ) -> Routine:
        flat, c, jit = geometry.flat(), self._config, host_jit(self._isa)
        pixels = batch * geometry.height * geometry.width
        count = pixels * flat.channels
        spec = MatrixSpec(
            flat, *group_rows(pixels, self._isa.unit(quantized=True)), self._bias is not None, self._post,
            U8, FLOAT, FLOAT, self._isa.unit(quantized=True), dynamic=True,
        )  # fmt: skip
        most = PANEL_BYTES // (spec.group * spec.stride) if spec.gathers else c["groups"]
        schedule = Schedule(max(1, min(c["groups"], most)), c["blocks"], bool(c["channels_first"]))
        words = (
            SCRATCH, self._weight.data_ptr(), 0 if self._bias is None else self._bias.data_ptr(),
            0 if self._residual is None else Operand(self._residual), OUT, pixels, *schedule.words(spec, pixels),
            self._scales.data_ptr(), self._numbers.data_ptr(), 0, self._sums.data_ptr(),
        )  # fmt: skip
        phases = (
            Phase(
                jit.address("dynamic range", lambda: dynamic.emit_range(self._isa)),
                (Operand(0), SCRATCH, count), dynamic.PARTS,
            ),
            Phase(
                jit.address("dynamic bytes", lambda: dynamic.emit_bytes(self._isa)),
                (Operand(0), SCRATCH, count), dynamic.tasks(count),
            ),
            Phase(
                jit.address(repr(spec), lambda: emit_matrix(self._isa, spec)), words, schedule.tasks(spec, pixels),
            ),
        )  # fmt: skip
        return Routine(phases, tuple(shape), layouts[0], tuple(layouts), dynamic.HEADER + count)
