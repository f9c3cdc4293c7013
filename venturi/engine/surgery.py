"""Edits of ONNX models: sanitize, extract, insert, prune, strip and restore weights. Models in, models out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from venturi.core.errors import ModelError
from venturi.core.registry import nearest
from venturi.engine.graph_file import pack_graph
from venturi.frontends.infer import infer_types
from venturi.ir.build import fresh_name, make_node
from venturi.ops.table import OPSET, find_op
from venturi.passes import cast_like, clean, constants, identities, shapes
from venturi.passes.rewriting import PassContext


def sanitize(model: ir.Model, fold_limit_bytes: int = 64 << 20) -> dict[str, int]:
    """Fold constants, drop what does nothing and what nobody reads; returns rewrites by pass. In place."""
    ctx = PassContext(fold_limit_bytes=fold_limit_bytes)
    for name, run in (
        ("resolve-cast-like", cast_like.run),
        ("fold-constants", constants.run),
        ("inline-branches", constants.inline_branches),
        ("remove-identities", identities.run),
        ("simplify-shapes", shapes.run),
        ("merge-duplicates", clean.merge_duplicates),
        ("remove-dead", clean.remove_dead),
    ):
        ctx.current = name
        run(model.graph, ctx)
    return dict(ctx.rewrites)


def find_value(graph: ir.Graph, name: str) -> ir.Value:
    """Raises ModelError with the nearest name."""
    known = {v.name: v for v in (*graph.inputs, *graph.initializers.values()) if v.name}
    known |= {v.name: v for n in graph for v in n.outputs if v.name}
    if name not in known:
        raise ModelError(f"the model has no value {name!r}.{nearest(name, [k for k in known if k])}")
    return known[name]


def extract(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The part of the graph between `inputs` and `outputs` (value names). Raises ModelError when an output needs
    something that `inputs` do not cover."""
    model = model.clone()
    graph = model.graph
    if not outputs:
        raise ModelError("extract needs at least one output")
    ends = [find_value(graph, n) for n in outputs]
    starts = [find_value(graph, n) for n in inputs] if inputs else list(graph.inputs)
    for value in starts:
        if value in graph.inputs or value.is_initializer():
            continue
        fresh = ir.Value(name=value.name, shape=value.shape, type=value.type)
        value.name = fresh_name(value.name or "cut")
        graph.inputs.append(fresh)
        ir.convenience.replace_all_uses_with(value, fresh, replace_graph_outputs=True)
        ends = [fresh if e is value else e for e in ends]
    graph.outputs.clear()
    for value in ends:
        if value in graph.inputs or value.is_initializer():
            copy = make_node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            value = copy.outputs[0]
        graph.outputs.append(value)
    clean.remove_dead(graph, PassContext())
    wanted = {*inputs} if inputs else None
    needed = [v.name for v in graph.inputs if v.uses() and wanted is not None and v.name not in wanted]
    if needed:
        raise ModelError(f"the outputs {list(outputs)} also need {needed}; add them to the inputs")
    kept = [v for v in graph.inputs if v.uses() or (wanted and v.name in wanted)]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    return model


def insert(model: ir.Model, op_type: str, at: str, domain: str = "") -> ir.Model:
    """Put a one-input operator behind value `at`: every reader of it reads the new node instead."""
    if find_op(domain, op_type) is None:
        raise ModelError(f"no operator {op_type!r} in domain {domain or 'ai.onnx'!r}")
    model = model.clone()
    value = find_value(model.graph, at)
    node = make_node(op_type, [value], domain=domain)
    out = node.outputs[0]
    readers = [(u, i) for u, i in value.uses()]
    was_output = value.is_graph_output()
    home = value.producer()
    if home is None:
        model.graph.insert_before(next(iter(model.graph)), node)
    else:
        model.graph.insert_after(home, node)
    for user, index in readers:
        user.replace_input_with(index, out)
    if was_output:
        for i, v in enumerate(model.graph.outputs):
            if v is value:
                model.graph.outputs[i] = out
        value.name, out.name = fresh_name(at), at
    infer_types(model)
    return model


def prune_2_4(model: ir.Model) -> tuple[ir.Model, int]:
    """Zero the two smallest of every four weights along the reduction axis; returns the number of tensors pruned."""
    model = model.clone()
    count = 0
    for node in model.graph:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        value = node.inputs[1]
        if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        weight = np.array(value.const_value.numpy())
        axis = (
            1 if node.op_type == "Conv" or (node.attributes.get("transB") and node.attributes["transB"].as_int()) else 0
        )
        if weight.ndim < 2 or weight.shape[axis] % 4:
            continue
        moved = np.moveaxis(weight, axis, -1)
        groups = moved.reshape(*moved.shape[:-1], -1, 4)
        order = np.argsort(np.abs(groups), axis=-1)
        np.put_along_axis(groups, order[..., :2], 0.0, axis=-1)
        pruned = np.moveaxis(groups.reshape(moved.shape), -1, axis)
        value.const_value = ir.Tensor(np.ascontiguousarray(pruned), name=value.name)
        count += 1
    return model, count


def strip_to_file(model: ir.Model, path: str | Path) -> int:
    """Write the model with its large weights as references to data that is not there; returns bytes left out."""
    graph, _ = pack_graph(model, "stripped")
    Path(path).write_bytes(graph)
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def reconstruct(path: str | Path, seed: int = 0) -> ir.Model:
    """Fill a stripped model with random weights of the right shapes (values are small, the model is for timing)."""
    rng = np.random.default_rng(seed)
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(Path(path).read_bytes()))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == "stripped":
            shape, kind = list(tensor.shape.numpy()), tensor.dtype.numpy()
            data = rng.standard_normal(shape) * 0.02 if np.dtype(kind).kind not in "iub" else rng.integers(0, 2, shape)
            value.const_value = ir.Tensor(np.asarray(data).astype(kind), dtype=tensor.dtype, name=value.name)
    return model


def save_model(model: ir.Model, path: str | Path) -> None:
    """Write ONNX; weights go to an external file beside it when the whole would pass protobuf's 2 GB.

    The file names the oldest opset in which all its operators mean the same, so that older runtimes read it.
    """
    model.opset_imports[""] = oldest_opset(model)
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if total > 1_900_000_000:
        ir.save(model, path, external_data=Path(path).name + ".data")
    else:
        ir.save(model, path)


def oldest_opset(model: ir.Model) -> int:
    """The newest version at which an operator in use changed; the model's own opset when one is not in the standard."""
    current = model.opset_imports.get("", OPSET)
    bodies = (model.graph, *(f.graph for f in model.functions.values()))
    found = {n.op_type for body in bodies for n in body.all_nodes() if not n.domain}
    try:
        return max((onnx.defs.get_schema(op, current).since_version for op in found), default=current)
    except onnx.defs.SchemaError:
        return current
