"""L3: importers. Each ends in one onnx-ir model at the fixed opset."""
