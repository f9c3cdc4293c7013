"""L6: the inference server. KServe v2 over HTTP and gRPC in front of engines; the only network code."""
