"""cuDNN's graph API: a convolution with pointwise operations behind it as one plan among many.

Needs the package nvidia-cudnn-frontend and the libcudnn that torch brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from venturi.core.errors import TuningError
from venturi.kernels.cudnn import frontend, handle

T = torch.Tensor
_X, _W, _Y, _FIRST = 1, 2, 3, 4


@dataclass(frozen=True)
class ConvProblem:
    """Shapes are logical NCHW or NCDHW, memory has the channels last.

    `steps` follow the convolution: (operation, argument) pairs, where "bias" and "add" take the next extra operand and
    activations a number or None. `tf32`: fp32 may be rounded to it.
    """

    image: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    pads: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    dtype: torch.dtype
    steps: tuple[tuple[str, float | None], ...]
    tf32: bool = False


class ConvPlan:
    """One of cuDNN's plans for a problem, ready to run; thread-safe."""

    def __init__(self, problem: ConvProblem, index: int) -> None:
        """Raises TuningError when there is no such plan or cuDNN refuses to build it."""
        self.problem, self.index = problem, index
        try:
            self._graph = _graph(problem)
            if index >= self._graph.get_execution_plan_count():
                raise TuningError(f"cuDNN has {self._graph.get_execution_plan_count()} plans for this problem")
            self._graph.build_plan_at_index(index)
            self.name = str(self._graph.get_plan_name_at_index(index))
            self._workspace = int(self._graph.get_workspace_size_plan_at_index(index))
        except (RuntimeError, ValueError, frontend().cudnnGraphNotSupportedError) as exc:
            raise TuningError(f"cuDNN: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}") from exc

    def run(self, x: T, weight: T, out: T, extra: Sequence[T]) -> None:
        """`extra` are the operands of the steps in order, all with channels last or one value a channel."""
        work = torch.empty(max(self._workspace, 1), dtype=torch.uint8, device=x.device)
        pack = {_X: x.data_ptr(), _W: weight.data_ptr(), _Y: out.data_ptr()}
        pack.update({_FIRST + i: t.data_ptr() for i, t in enumerate(extra)})
        self._graph.execute_plan_at_index(pack, work, self.index, handle=handle())


def channels_last_strides(shape: Sequence[int]) -> list[int]:
    """Of a compact tensor of logical shape [images, channels, *sizes]."""
    strides, size = [], shape[1]
    for n in reversed(shape[2:]):
        strides.append(size)
        size *= n
    return [size, 1, *reversed(strides)]


def _graph(p: ConvProblem) -> Any:
    cudnn = frontend()
    kinds = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}
    kinds[torch.float32] = cudnn.data_type.FLOAT
    kind, wide = kinds[p.dtype], cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=wide, compute_data_type=wide, handle=handle())

    def tensor(shape: Sequence[int], uid: int) -> Any:
        return graph.tensor(dim=list(shape), stride=channels_last_strides(shape), data_type=kind).set_uid(uid)

    value = graph.conv_fprop(
        image=tensor(p.image, _X), weight=tensor(p.weight, _W), padding=list(p.pads), stride=list(p.strides),
        dilation=list(p.dilations), compute_data_type=wide,
    )  # fmt: skip
    extra = _FIRST
    for name, number in p.steps:
        if name == "bias":
            value = graph.bias(input=value, bias=tensor((1, p.output[1], *(1 for _ in p.pads)), extra))
            extra += 1
        elif name == "add":
            value = graph.add(a=value, b=tensor(p.output, extra))
            extra += 1
        elif name == "Swish":
            value = graph.swish(input=value, swish_beta=number)
        else:
            value = getattr(graph, name.lower())(input=value)
    value.set_output(True).set_data_type(kind).set_uid(_Y).set_dim(list(p.output)).set_stride(
        channels_last_strides(p.output)
    )
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B, cudnn.heur_mode.FALLBACK])
    if p.dtype == torch.float32 and not p.tf32:
        rounding = (cudnn.numerical_note.TENSOR_CORE, cudnn.numerical_note.DOWN_CONVERT_INPUTS)
        graph.deselect_numeric_notes(list(rounding))
    graph.check_support()
    return graph
