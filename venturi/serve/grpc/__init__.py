"""KServe v2 over gRPC: message conversion and the service."""
