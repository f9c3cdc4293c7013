"""ONNX in: files, bytes, protobufs and onnx-ir models → one checked model at the fixed opset, types inferred."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from venturi.core.errors import ModelError, mapped
from venturi.frontends.infer import infer_types
from venturi.frontends.upgrade import upgrade_model
from venturi.ir.build import fresh_name, make_node, reserve_names, subgraphs
from venturi.ir.verify import sort_topologically, verify
from venturi.ops.table import OPSET, find_op, get_op, normalize_domain

MAX_MODEL_PROTO_BYTES = 2**31 - 1


def import_onnx(source: str | Path | bytes | onnx.ModelProto | ir.Model) -> ir.Model:
    """Import a model. Raises ModelError for damaged, cyclic or unsupported ones (every unsupported node listed).

    Weights in external files are mapped, not read. The caller's model is not changed.
    """
    model = _read(source)
    where = str(source) if isinstance(source, str | Path) else "model"
    with mapped(where, ModelError):
        _check_opset(model)
        reserve_names(n for node in model.graph.all_nodes() for n in (node.name, *(v.name for v in node.outputs)))
        reserve_names(model.graph.initializers)
        _name_nodes(model.graph)
        sort_topologically(model.graph)
        _check_definitions(model.graph)
        _infer_missing_ranks(model)
        upgrade_model(model)
        _inline_functions(model)
        check_supported(model.graph)
        _lift_constants(model.graph)
        for value in list(model.graph.initializers.values()):
            _check_initializer(value)
        _drop_initializer_inputs(model.graph)
        common.NameFixPass()(model)
        infer_types(model)
        verify(model.graph)
    return model


def _read(source: Any) -> ir.Model:
    if isinstance(source, ir.Model):
        copy: ir.Model = source.clone()
        return copy
    if isinstance(source, onnx.ModelProto):
        with mapped("model", ModelError):
            converted: ir.Model = ir.from_proto(source)
            return converted
    if isinstance(source, bytes | bytearray):
        return _parse(bytes(source), "bytes")
    path = Path(source)
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}; expected an .onnx model")
    if path.stat().st_size == 0:
        raise ModelError("the file is empty", where=str(path))
    with mapped(str(path), ModelError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: ir.Model = ir.load(path)
        _check_external(model.graph, path.resolve().parent)
        return model


def _parse(data: bytes, where: str) -> ir.Model:
    proto = onnx.ModelProto()
    with mapped(where, ModelError):
        proto.ParseFromString(data)
        parsed: ir.Model = ir.from_proto(proto)
        return parsed


def _check_external(graph: ir.Graph, folder: Path) -> None:
    """External data must lie inside the model's folder and be long enough."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        target = (folder / tensor.location).resolve()
        if not target.is_relative_to(folder):
            raise ModelError(
                f"weight {value.name!r} names external data {tensor.location!r} outside the model's folder; "
                "refusing to read it"
            )
        if not target.is_file():
            raise ModelError(f"weight {value.name!r} needs external data file {str(target)!r}, which does not exist")
        offset, size = tensor.offset or 0, target.stat().st_size
        if offset < 0 or offset + tensor.nbytes > size:
            raise ModelError(
                f"weight {value.name!r} needs bytes {offset}..{offset + tensor.nbytes} of {tensor.location!r}, "
                f"which has {size}"
            )


def _check_opset(model: ir.Model) -> None:
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is not None and version > OPSET:
        raise ModelError(f"the model needs opset {version}; this version of venturi knows up to {OPSET}")
    if not model.graph.outputs:
        raise ModelError("the model has no outputs: the file is empty, cut off, or not ONNX")


def _name_nodes(graph: ir.Graph) -> None:
    """Every node gets a unique name and remembers it as its source."""
    seen: set[str] = set()
    for node in graph:
        name = node.name or f"{node.op_type}:{node.outputs[0].name if node.outputs else ''}"
        node.name = name if name not in seen else fresh_name(name)
        seen.add(node.name)
        node.metadata_props["source"] = node.name
        node.domain = normalize_domain(node.domain)
        for sub in subgraphs(node):
            _name_nodes(sub)


def _check_definitions(graph: ir.Graph) -> None:
    """Report every value that is read but never defined."""
    missing = _undefined(graph, set())
    if missing:
        raise ModelError("values are read but never defined: " + "; ".join(missing[:20]))


def _undefined(graph: ir.Graph, outer: set[ir.Value]) -> list[str]:
    known = outer | set(graph.inputs) | set(graph.initializers.values())
    missing = []
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                missing.append(f"{value.name!r} by node {node.name!r} ({node.op_type})")
        for sub in subgraphs(node):
            missing.extend(_undefined(sub, known))
        known.update(node.outputs)
    missing += [f"{v.name!r} as a graph output" for v in graph.outputs if v not in known]
    return missing


def _infer_missing_ranks(model: ir.Model) -> None:
    """Old models leave intermediate types out; upgrades need ranks, so infer at the model's own opset."""
    if model.opset_imports.get("", OPSET) < 13 and not model.functions:
        infer_types(model, fill=False)


def _inline_functions(model: ir.Model) -> None:
    """Model-local functions are inlined, except those the operator table implements as a whole."""
    for key in list(model.functions):
        if find_op(key[0], key[1]) is not None:
            del model.functions[key]
    if model.functions:
        common.InlinePass()(model)
        _name_nodes(model.graph)


def check_supported(graph: ir.Graph) -> None:
    """Raise one ModelError that lists every unsupported node and attribute of the graph and its subgraphs."""
    problems = list(_unsupported(graph))
    if problems:
        shown = "\n  ".join(problems[:50])
        more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise ModelError(f"{len(problems)} nodes are not supported:\n  {shown}{more}")


def _unsupported(graph: ir.Graph) -> Iterable[str]:
    for node in graph:
        op = find_op(node.domain, node.op_type)
        if op is None:
            try:
                get_op(node.domain, node.op_type)
            except ModelError as exc:
                yield f"{node.name!r}: {exc}"
        elif unknown := [a for a in node.attributes if not op.accepts(a)]:
            yield f"{node.name!r}: {node.op_type} has no attribute {', '.join(map(repr, unknown))}"
        for sub in subgraphs(node):
            yield from _unsupported(sub)


def _lift_constants(graph: ir.Graph) -> None:
    """Constant nodes become initializers of their graph; graph outputs keep an Identity."""
    for node in list(graph):
        for sub in subgraphs(node):
            _lift_constants(sub)
        if node.op_type != "Constant" or node.domain != "":
            continue
        tensor = constant_tensor(node)
        if tensor is None:
            continue
        old = node.outputs[0]
        value = ir.Value(
            name=fresh_name(old.name or "const"), shape=ir.Shape(list(tensor.shape.numpy())),
            type=ir.TensorType(tensor.dtype), const_value=tensor,
        )  # fmt: skip
        graph.register_initializer(value)
        if old.is_graph_output():
            graph.insert_before(node, copy := make_node("Identity", [value]))
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            value = copy.outputs[0]
        name = old.name
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        if value.is_graph_output():
            old.name, value.name = None, name
        graph.remove(node, safe=True)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node; None for sparse ones."""
    for name, a in node.attributes.items():
        if name == "value":
            return a.as_tensor()
        if name in ("value_int", "value_ints"):
            return ir.tensor(a.value, dtype=ir.DataType.INT64)
        if name in ("value_float", "value_floats"):
            return ir.tensor(a.value, dtype=ir.DataType.FLOAT)
        if name in ("value_string", "value_strings"):
            return ir.tensor(a.value, dtype=ir.DataType.STRING)
    return None


def _check_initializer(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None:
        raise ModelError(f"initializer {value.name!r} has no data")
    if any(d < 0 for d in tensor.shape.numpy()):
        raise ModelError(f"initializer {value.name!r} has a negative dimension: {list(tensor.shape)}")
    try:
        array = tensor.numpy()
    except Exception as exc:
        raise ModelError(f"initializer {value.name!r} of shape {list(tensor.shape)} cannot be read: {exc}") from exc
    if list(array.shape) != list(tensor.shape.numpy()):
        raise ModelError(f"initializer {value.name!r} has shape {list(array.shape)}, declared {list(tensor.shape)}")
    value.shape, value.type = ir.Shape(list(tensor.shape.numpy())), ir.TensorType(tensor.dtype)


def _drop_initializer_inputs(graph: ir.Graph) -> None:
    """IR version 3 lists weights among the inputs; a weight with a value is not an input here."""
    kept = [v for v in graph.inputs if v.name not in graph.initializers]
    dropped = [v for v in graph.inputs if v.name in graph.initializers]
    if dropped:
        graph.inputs.clear()
        graph.inputs.extend(kept)


logging.getLogger("onnx_ir").setLevel(logging.ERROR)
