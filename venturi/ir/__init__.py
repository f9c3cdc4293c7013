"""L1: helpers around onnx-ir, the graph container: types, building, Regions, patterns, verification, printing."""
