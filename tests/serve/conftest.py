"""What several files of server tests ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Any) -> Iterator[Any]:
    """tritonclient over each protocol, on the test file's own server; `module` has its input classes."""
    module = {"http": http_client, "grpc": grpc_client}[request.param]
    made = module.InferenceServerClient(server.url(request.param))
    made.module = module
    yield made
    made.close()
