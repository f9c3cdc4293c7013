"""Quantized models as the passes leave them for a GPU. Imports nothing that asks for Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from onnx import TensorProto, helper

from venturi.backends.base import RegionView
from venturi.backends.cuda.backend import cuda_backend
from venturi.backends.cuda.device import OfflineDevice
from venturi.engine.builder import pass_context, stored_weights
from venturi.frontends.onnx_import import import_onnx
from venturi.passes.pipeline import run_pipeline

BACKEND = cuda_backend(OfflineDevice(90), torch.device("cpu"))


def optimized(m, shape, output):
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(m.nodes, "g", [given], [out], m.weights)
    model = import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    run_pipeline(model, pass_context(SimpleNamespace(precision="model"), BACKEND))
    return model


def quantized_regions(model):
    weights = stored_weights(model.graph)
    return [r for r in (RegionView(n, weights) for n in model.graph) if r.kind == "quantized"]
