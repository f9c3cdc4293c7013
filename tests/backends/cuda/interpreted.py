"""Runs generated kernels on CPU tensors through Triton's interpreter.

Must be imported before Triton anywhere in the process: TRITON_INTERPRET is read when kernels are decorated. The
patches fix Triton 3.6's interpreter under numpy >= 2.4 (loop bounds), its bf16 dot (treats bits as integers) and its
rounding to bf16 and fp8 (truncates; loses carries; keeps the bits of integers).
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


def _as_fp32(handle):
    scalar = handle.dtype.scalar
    if scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if scalar.is_floating() and scalar.primitive_bitwidth == 8:
        half = interpreter._convert_float(handle.data, scalar, tl.float16, None)
        return half.view(np.float16).astype(np.float32)
    return handle.data


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(_as_fp32(a), _as_fp32(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


_cast = interpreter.InterpreterBuilder.cast_impl


def _rounding_cast(self, source, kind):
    if source.dtype.scalar.is_int() and kind.scalar == tl.bfloat16:
        source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
    if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        data = np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded)
        return interpreter.TensorHandle(data.reshape(source.data.shape), kind.scalar)
    return _cast(self, source, kind)


_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp


def _to_fp8(self, source, kind, rounding_mode):
    if source.dtype.scalar in (tl.float32, tl.bfloat16) and kind.scalar == tl.float8e4nv:
        packed = torch.from_numpy(np.ascontiguousarray(_as_fp32(source))).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(packed.view(torch.uint8).numpy(), kind.scalar)
    return _fp_to_fp(self, source, kind, rounding_mode)


_patch_tensor = interpreter._patch_lang_tensor


def _with_index(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _rounding_cast
interpreter.InterpreterBuilder.create_fp_to_fp = _to_fp8
for _name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
    setattr(interpreter.InterpreterBuilder, f"create_{_name}", lambda self, source, kind: self.cast_impl(source, kind))
interpreter._patch_lang_tensor = _with_index


_INSTRUCTIONS = {
    "ex2.approx.ftz.f32": "tl.exp2(x)",
    "rcp.approx.ftz.f32": "1.0 / x",
    "add.f32 $0": "x + y",
    "fma.rn.sat.f32": "tl.minimum(tl.maximum(x * y + z, 0.0), 1.0)",
    "{ .reg .b32 p, q; shl.b32": "tl.maximum(x, y)",
}


class InterpretedDevice:
    """A KernelDevice whose kernels run element by element in numpy."""

    arch = 90
    num_sms = 4

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="venturi-interpreted-"))
        self.launched: list[str] = []

    def kernel(self, source):
        path = self._folder / f"{source.name}_{source.key}.py"
        text = re.sub(r".*gdc_.*\n", "", source.text)
        for instruction, same in _INSTRUCTIONS.items():
            text = re.sub(rf"tl\.inline_asm_elementwise\(\s*\"{re.escape(instruction)}.*", same, text)
        assert "inline_asm" not in text
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return _Interpreted(self, getattr(module, source.name), source)


class _Interpreted:
    def __init__(self, device, fn, source) -> None:
        self._device, self._fn, self._source = device, fn, source

    def launch(self, grid, args) -> None:
        if 0 in grid:
            return
        self._device.launched.append(self._source.name)
        kinds = [kind for _, kind in self._source.signature if kind != "constexpr"]
        assert len(kinds) == len(args), (kinds, len(args))
        given = [self._descriptor(kind, a) if kind.startswith("tensordesc") else a for kind, a in zip(kinds, args)]
        names = [name for name, kind in self._source.signature if kind != "constexpr"]
        self._fn[tuple(grid)](**dict(zip(names, given)), **dict(self._source.constants))

    @staticmethod
    def _descriptor(kind, tensor):
        block = [int(b) for b in kind.split("[")[1].split("]")[0].split(",")]
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
