"""`vt.Network`: build a model layer by layer. Every operator is a method; shapes are checked at the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from venturi.core.errors import ModelError, ShapeError
from venturi.core.registry import nearest
from venturi.frontends.infer import check_node
from venturi.ir.build import constant, make_node
from venturi.ir.dtypes import dtype_from_name, dtype_name, dtype_names
from venturi.ops.table import CONTRIB, OPS, OPSET, load_all

Dim = int | str | None


class Tensor:
    """A value of a Network. Arithmetic, comparison, matmul and basic slicing work as in numpy."""

    def __init__(self, network: Network, value: ir.Value) -> None:
        self.network = network
        self.value = value

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def shape(self) -> tuple[Dim, ...] | None:
        """Ints for known sizes, names for free ones, None for unknown ones."""
        if self.value.shape is None:
            return None
        return tuple(d if isinstance(d, int) else d.value for d in self.value.shape)

    @property
    def dtype(self) -> str:
        return dtype_name(self.value.dtype)

    def _binary(self, op: str, other: Any, swap: bool = False) -> Tensor:
        out: Tensor = self.network.op(op, other, self) if swap else self.network.op(op, self, other)
        return out

    def __add__(self, other: Any) -> Tensor:
        return self._binary("Add", other)

    def __radd__(self, other: Any) -> Tensor:
        return self._binary("Add", other, True)

    def __sub__(self, other: Any) -> Tensor:
        return self._binary("Sub", other)

    def __rsub__(self, other: Any) -> Tensor:
        return self._binary("Sub", other, True)

    def __mul__(self, other: Any) -> Tensor:
        return self._binary("Mul", other)

    def __rmul__(self, other: Any) -> Tensor:
        return self._binary("Mul", other, True)

    def __truediv__(self, other: Any) -> Tensor:
        return self._binary("Div", other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return self._binary("Div", other, True)

    def __pow__(self, other: Any) -> Tensor:
        return self._binary("Pow", other)

    def __matmul__(self, other: Any) -> Tensor:
        return self._binary("MatMul", other)

    def __neg__(self) -> Tensor:
        out: Tensor = self.network.op("Neg", self)
        return out

    def __lt__(self, other: Any) -> Tensor:
        return self._binary("Less", other)

    def __gt__(self, other: Any) -> Tensor:
        return self._binary("Greater", other)

    def __getitem__(self, index: Any) -> Tensor:
        """Slices and integers, as numpy takes them; no ellipsis, no arrays."""
        return self.network._getitem(self, index if isinstance(index, tuple) else (index,))

    def __repr__(self) -> str:
        return f"Tensor({self.name}: {self.dtype}{list(self.shape) if self.shape is not None else '?'})"


_TYPE_ATTRIBUTES = {"to", "dtype"}


class Network:
    """A model under construction.

    `net.conv(x, w, b, strides=[2, 2])` adds ONNX's Conv: positional arguments are inputs (Tensors, numpy arrays,
    numbers), keyword arguments attributes or optional inputs. The method's name is the operator's in any spelling
    (`max_pool`, `layer_normalization`, `matmul`); `op("Conv", ...)` is the same.

    >>> import numpy as np
    >>> net = Network("double")
    >>> x = net.input("x", ("n", 3))
    >>> y = net.relu(x @ np.ones((3, 4), np.float32) * 2)
    >>> y.shape
    ('n', 4)
    >>> net.output("y", y)
    """

    def __init__(self, name: str = "network") -> None:
        self._count = 0
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET, CONTRIB: 1, "ai.onnx.ml": 5})

    def input(self, name: str, shape: Sequence[Dim], dtype: Any = "float32") -> Tensor:
        """Declare an input: ints are fixed sizes, strings name free ones."""
        if any(v.name == name for v in self.graph.inputs):
            raise ModelError(f"the network has an input {name!r} already")
        value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(_data_type(dtype)))
        self.graph.inputs.append(value)
        return Tensor(self, value)

    def constant(self, array: Any, name: str = "const") -> Tensor:
        """A weight."""
        return Tensor(self, constant(self.graph, np.array(array, order="C"), name))

    def output(self, name: str, x: Tensor) -> None:
        """Declare `x` as an output called `name`."""
        if any(v.name == name for v in self.graph.outputs):
            raise ModelError(f"the network has an output {name!r} already")
        copy = make_node("Identity", [x.value])
        copy.outputs[0].name = name
        copy.outputs[0].type, copy.outputs[0].shape = x.value.type, x.value.shape
        self.graph.append(copy)
        self.graph.outputs.append(copy.outputs[0])

    def op(
        self,
        op_type: str,
        *inputs: Any,
        domain: str = "",
        num_outputs: int = 1,
        name: str | None = None,
        **attrs: Any,
    ) -> Any:
        """Add an operator. Returns its Tensor, or a tuple when num_outputs > 1.

        Attributes that say a type (`to`, `dtype`) take what `input` takes, or ONNX's number of it.

        Raises ModelError for unknown operators and attributes and for operands that are no values, ShapeError when the
        operator refuses its inputs.
        """
        load_all()
        record = OPS.get((domain, op_type))
        if record is None:
            names = [n for d, n in OPS if d == domain]
            raise ModelError(f"no operator {op_type!r}.{nearest(op_type, names)}")
        slots = _input_names(record.reference)
        operands = list(inputs)
        for key in [k for k in attrs if not record.accepts(k)]:
            if key not in slots:
                known = sorted(record.attributes | set(slots))
                raise ModelError(f"{op_type} has no attribute or input {key!r}.{nearest(key, known)} It takes {known}")
            at = slots.index(key)
            operands += [None] * (at + 1 - len(operands))
            operands[at] = attrs.pop(key)
        for key in _TYPE_ATTRIBUTES & attrs.keys():
            attrs[key] = attrs[key] if isinstance(attrs[key], int) else int(_data_type(attrs[key]))
        like = next((o for o in operands if isinstance(o, Tensor)), None)
        values = [None if o is None else self._value(o, like) for o in operands]
        self._count += 1
        name = name or f"{op_type}_{self._count}"
        node = make_node(op_type, values, attrs, domain=domain, num_outputs=num_outputs, name=name)
        check_node(node)
        self.graph.append(node)
        made = tuple(Tensor(self, v) for v in node.outputs)
        return made[0] if num_outputs == 1 else made

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        op_type = _operator_named(name)
        if op_type is None:
            raise AttributeError(f"Network has no operator {name!r}.{nearest(name.replace('_', ''), _by_spelling())}")
        return lambda *inputs, **attrs: self.op(op_type, *inputs, **attrs)

    def to_model(self) -> ir.Model:
        """The finished model. Raises ModelError when it has no output."""
        if not self.graph.outputs:
            raise ModelError("the network has no output; call net.output(name, tensor)")
        return ir.Model(self.graph, ir_version=11, producer_name="venturi")

    def _value(self, operand: Any, like: Tensor | None) -> ir.Value:
        if isinstance(operand, Tensor):
            if operand.network is not self:
                raise ModelError(f"{operand!r} belongs to another network")
            return operand.value
        array = np.asarray(operand)
        if array.dtype == object and not all(isinstance(x, str) for x in array.flat):
            raise ModelError(
                f"an operand is a Tensor, an array or a number, got {operand!r}; attributes are given by name"
            )
        if array.dtype == np.float64 and not isinstance(operand, np.ndarray):
            array = array.astype(np.float32)
        if isinstance(operand, int | float) and not isinstance(operand, bool) and like is not None and like.value.dtype:
            array = np.asarray(operand, dtype=like.value.dtype.numpy())
        return constant(self.graph, np.array(array, order="C"))

    def _getitem(self, x: Tensor, index: tuple[Any, ...]) -> Tensor:
        starts, ends, axes, steps, drop = [], [], [], [], []
        for axis, item in enumerate(index):
            if isinstance(item, int):
                starts.append(item)
                ends.append(item + 1 if item != -1 else 2**31 - 1)
                steps.append(1)
                axes.append(axis)
                drop.append(axis)
            elif isinstance(item, slice):
                if item == slice(None):
                    continue
                step = item.step or 1
                starts.append(item.start if item.start is not None else (0 if step > 0 else 2**31 - 1))
                ends.append(item.stop if item.stop is not None else (2**31 - 1 if step > 0 else -(2**31)))
                steps.append(step)
                axes.append(axis)
            else:
                raise ShapeError(f"a Network tensor takes slices and integers, got {type(item).__name__}")
        out = self.op("Slice", x, *(np.array(v, dtype=np.int64) for v in (starts, ends, axes, steps))) if axes else x
        return self.op("Squeeze", out, np.array(drop, dtype=np.int64)) if drop else out  # type: ignore[no-any-return]


def _data_type(dtype: Any) -> ir.DataType:
    if isinstance(dtype, ir.DataType):
        return dtype
    if isinstance(dtype, str):
        found = dtype_from_name(dtype)
        if found is None:
            raise ShapeError(f"unknown dtype {dtype!r}.{nearest(dtype, dtype_names())}")
        return found
    return ir.DataType.from_numpy(np.dtype(dtype))


def _input_names(reference: Callable[..., Any]) -> list[str]:
    import inspect

    return [p.name for p in inspect.signature(reference).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]


def _by_spelling() -> dict[str, str]:
    load_all()
    return {n.lower(): n for d, n in OPS if d == ""}


def _operator_named(name: str) -> str | None:
    return _by_spelling().get(name.replace("_", "").lower())
