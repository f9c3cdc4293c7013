"""graph.onnx inside an engine: the graph of Regions, its weights as external data in the file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from venturi.core.errors import EngineError, mapped
from venturi.engine import weights as safetensors
from venturi.engine.container import Chunks
from venturi.ops.tensors import to_numpy, to_torch

INLINE_BYTES = 256


def pack_graph(model: ir.Model, weights_name: str) -> tuple[bytes, Chunks]:
    """(graph.onnx, weights file). Large initializers become references into the latter; the model is unchanged."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is None or value.dtype == ir.DataType.STRING:
            continue
        if value.const_value.nbytes > INLINE_BYTES and safetensors.can_store(array := value.const_value.numpy()):
            arrays[name] = np.asarray(array)
    header, spans = safetensors.layout(arrays)
    held = {name: model.graph.initializers[name].const_value for name in arrays}
    for name, array in arrays.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        begin, end = spans[name]
        value.const_value = ir.ExternalTensor(
            weights_name,
            len(header) + begin,
            end - begin,
            value.dtype,
            shape=ir.Shape(list(array.shape)),
            name=name,
        )
    try:
        proto = ir.to_proto(model)
    finally:
        for name, tensor in held.items():
            model.graph.initializers[name].const_value = tensor
    return proto.SerializeToString(), safetensors.write(arrays)


def unpack_graph(data: memoryview, weights: memoryview | None, where: str) -> tuple[ir.Model, dict[str, Any]]:
    """(model, stored weights by name). Weights view the mapped file. Raises EngineError for damaged content."""
    with mapped(where, EngineError):
        proto = onnx.ModelProto()
        proto.ParseFromString(bytes(data))
        model = ir.from_proto(proto)
        arrays = {} if weights is None else safetensors.read(weights)
        stored: dict[str, Any] = {}
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                if name not in arrays:
                    raise EngineError(f"weight {name!r} is not in the file; a stripped engine needs weights=...")
                array = arrays[name]
                if list(array.shape) != list(tensor.shape) or tensor.dtype != ir.DataType.from_numpy(array.dtype):
                    found, said = f"{array.dtype}{list(array.shape)}", f"{tensor.dtype}{list(tensor.shape)}"
                    raise EngineError(f"weight {name!r} is {found}, the graph says {said}")
                value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=name)
                stored[name] = to_torch(array, tensor.dtype)
            elif tensor is not None:
                stored[name] = to_torch(tensor.numpy(), tensor.dtype)
        return model, stored


def set_weights(model: ir.Model, new: Mapping[str, Any]) -> list[str]:
    """Replace initializers by name in place; returns those whose values were given. Raises EngineError for misfits."""
    unknown = [n for n in new if n not in model.graph.initializers]
    if unknown:
        from venturi.core.registry import nearest

        hint = nearest(unknown[0], model.graph.initializers)
        raise EngineError(f"the model has no weights named {unknown[:10]}.{hint}")
    for name, given in new.items():
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        array = np.asarray(to_numpy(given) if not isinstance(given, np.ndarray) else given)
        if list(array.shape) != list(tensor.shape):
            raise EngineError(f"weight {name!r} has shape {list(tensor.shape)}, got {list(array.shape)}")
        if ir.DataType.from_numpy(array.dtype) != tensor.dtype:
            raise EngineError(f"weight {name!r} is {tensor.dtype}, got {array.dtype}")
        value.const_value = ir.Tensor(np.array(array, order="C"), dtype=tensor.dtype, name=name)
    return list(new)
