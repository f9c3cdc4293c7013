"""Which tensors are laid out anew on their way from one step to the next, found by watching one run on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from venturi.engine.plan import Reorder
from venturi.runtime.executable import Call, Executable
from venturi.runtime.watch import layout_of

_NAMES = {
    torch.contiguous_format: "row-major",
    torch.channels_last: "channels last",
    torch.channels_last_3d: "channels last",
    None: "strided",
}
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def find_reorders(executable: Executable, args: Sequence[Any], names: Sequence[str]) -> tuple[Reorder, ...]:
    """Run once on `args`, the inputs called `names`, and compare how tensors lie with how they are read.

    How generated code and library convolutions read is known; views that had to be copied count too. What other library
    kernels copy inside is not seen.
    """
    env = list(executable.template)
    makers: dict[int, str] = {}
    for slot, arg, name in zip(executable.inputs, args, names):
        env[slot], makers[slot] = arg, f"input {name!r}"
    found = []
    for call in executable.calls:
        inputs = [env[i] for i in call.inputs]
        wanted = _wanted(call, inputs)
        result = call.kernel.run(*inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        if _copied_view(call, inputs, outputs):
            wanted = [torch.contiguous_format, *wanted[1:]]
        for slot, x, layout in zip(call.inputs, inputs, wanted):
            if layout is not None and slot in makers and not x.is_contiguous(memory_format=layout):
                found.append(_reorder(call, makers[slot], x, layout))
        for slot, value in zip(call.outputs, outputs):
            env[slot], makers[slot] = value, call.step.name
        for slot in call.dead:
            env[slot] = None
    return tuple(found)


def _wanted(call: Call, inputs: Sequence[Any]) -> list[torch.memory_format | None]:
    """How each input must lie, None where any order will do."""
    shapes = [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)]
    if call.kernel.parallel is not None and len(shapes) == len(inputs):
        routine = call.kernel.parallel.routine(tuple(shapes))
        if routine is not None:
            return list(routine.layouts)
    return [call.kernel.reads, *[None] * (len(inputs) - 1)]


def _copied_view(call: Call, inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
    if (
        set(call.step.ops) - _VIEWS
        or not isinstance(inputs[0], torch.Tensor)
        or not isinstance(outputs[0], torch.Tensor)
    ):
        return False
    given, made = (x.untyped_storage().data_ptr() for x in (inputs[0], outputs[0]))
    return given != made and inputs[0].numel() > 0


def _reorder(call: Call, maker: str, x: torch.Tensor, layout: torch.memory_format) -> Reorder:
    lies, wanted = _NAMES[layout_of(x)], _NAMES[layout]
    if maker.startswith("input "):
        why = f"the caller's tensor is {lies}"
    elif set(call.step.ops) <= _VIEWS:
        why = f"a {call.step.ops[0]} mixes axes that lie {lies}"
    else:
        why = f"{maker} leaves it {lies}"
    return Reorder(
        maker, call.step.name, call.step.tactic, lies, wanted, x.nbytes, f"{why}, {call.step.tactic} reads it {wanted}"
    )
