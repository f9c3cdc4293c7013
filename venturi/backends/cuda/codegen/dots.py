"""The products of one step along K, as Triton text, and how weights are stored for them.

fp32 in parts: x = high + low with 11 bits each, x * w = high * high + (low * high + high * low) but for 2^-22 of it.
The two sums are kept apart, because an infinity times a part that is zero is NaN: such a NaN is left out at the end,
where the sum of the high parts says what the result is. After Ootomo and Yokota, "Recovering single precision
accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from venturi.backends.cuda.codegen.element import Element
from venturi.ir.dtypes import DT
from venturi.ir.quantization import FP8

T = torch.Tensor
_LOW_BITS = 13


def first_sums(element: Element) -> list[str]:
    """Before the first step: what `step_sums` adds to."""
    names = ["acc", "rest"] if element.in_parts else ["acc"]
    return [f"{name} = tl.zeros((BM, BN), {element.sums})" for name in names]


def step_sums(element: Element, x: str, w: str, low: str, rounded: bool = False) -> list[str]:
    """`x`, `w` and `low` are expressions of tiles [BM, BK] and [BK, BN]; `low` is only read in parts. `rounded` as in
    GemmConfig."""
    if element.dtype == FP8:
        return [f"acc = tl.dot({x}, {w}, acc, max_num_imprecise_acc=BK)"]
    if element.dtype != DT.FLOAT:
        return [f"acc = tl.dot({x}, {w}, acc, out_dtype={element.sums})"]
    if not element.in_parts:
        return [f'acc = tl.dot({x}, {w}, acc, input_precision="tf32")']
    summed = 'tl.dot(high, main, acc, input_precision="tf32")'
    if rounded:
        summed = '_added(acc, tl.dot(high, main, input_precision="tf32"))'
    return [
        f"whole = {x}",
        f"main = {w}",
        "high = _high(whole)",
        'rest = tl.dot(_low(whole, high), main, rest, input_precision="tf32")',
        f'rest = tl.dot(high, {low}, rest, input_precision="tf32")',
        f"acc = {summed}",
    ]


def parts(name: str) -> list[str]:
    """The two parts of a tile of fp32."""
    return [f"{name}_high = _high({name})", f"{name}_low = _low({name}, {name}_high)"]


def product(out: str, x: str, w: str, element: Element, start: str = "None", transposed: bool = False) -> list[str]:
    """`out` = `start` + x @ w of named tiles, or x @ w^T. Where operands come in parts, `parts` of both are there."""
    end = "" if element.dtype != DT.FLOAT else ', input_precision="tf32"'

    def dot(a: str, b: str, acc: str) -> str:
        return f"tl.dot({a}, {f'tl.trans({b})' if transposed else b}, {acc}{end})"

    if not element.in_parts:
        return [f"{out} = {dot(x, w, start)}"]
    return [
        f"rest = {dot(f'{x}_low', f'{w}_high', 'None')}",
        f"rest = {dot(f'{x}_high', f'{w}_low', 'rest')}",
        f"{out} = {dot(f'{x}_high', f'{w}_high', start)} + tl.where(rest == rest, rest, 0.0)",
    ]


def last_sums(element: Element) -> list[str]:
    """After the last step: the sums of one program in `acc`."""
    return ["acc += tl.where(rest == rest, rest, 0.0)"] if element.in_parts else []


def stored(weight: T, element: Element) -> T:
    """[n, ...] as the steps read it: in parts [2n, ...], high ones first; for tf32 rounded to the nearest."""
    if element.dtype != DT.FLOAT:
        return weight
    if not element.in_parts:
        return _cut(weight, 1 << (_LOW_BITS - 1))
    high = _cut(weight, 0)
    low = torch.where(weight.isinf(), torch.zeros((), device=weight.device), weight - high)
    return torch.cat([high, low])


def _cut(x: T, half: int) -> T:
    """The high bits of finite numbers, `half` added first."""
    bits = x.contiguous().view(torch.int32)
    cut = ((bits + half) & -(1 << _LOW_BITS)).view(torch.float32)
    return torch.where(cut.isfinite() & x.isfinite(), cut, x)


def low_rows(element: Element, text: Sequence[str]) -> list[str]:
    """`text` where operands come in parts, else nothing."""
    return list(text) if element.in_parts else []
