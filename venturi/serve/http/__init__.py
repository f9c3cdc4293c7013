"""KServe v2 over HTTP: the wire format and an ASGI application."""
