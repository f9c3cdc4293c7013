"""The OpenAPI document says what the server answers: thousands of requests made from it, each answer checked against it."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.running import add_engine, add_sub, scaled, serving
from venturi.serve.http.openapi import INFERENCE, document, template
from venturi.serve.http.routes import ROUTES

CASES = 100
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
NAMES = {"model": ["m", "pair", "nobody", ".."], "version": ["1", "2", "x"], "repository": ["r"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Any:
    root = tmp_path_factory.mktemp("openapi")
    add_engine(root, "m", scaled(2.0))
    add_engine(root, "pair", add_sub("float32"), "max_batch_size: 8 dynamic_batching {}")
    with serving(root) as running:
        yield running


def fetch(server: Any) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{server.url('http')}/openapi.json") as reply:
        return json.loads(reply.read())


def test_every_route_is_described(server: Any) -> None:
    found = fetch(server)
    described = {(path, method.upper()) for path, verbs in found["paths"].items() for method in verbs}
    expected = {(template(r.path), m) for r in ROUTES for m in r.methods} | {(template(p), "POST") for p in INFERENCE}
    assert described == expected
    assert found == document(ROUTES)
    assert all(verb["summary"] and verb["responses"] for verbs in found["paths"].values() for verb in verbs.values())


def test_answers_are_as_the_document_says(server: Any) -> None:
    """Names of models and versions are taken from a list, so that most requests reach one. Bodies also break the schema."""
    found = fetch(server)
    for verbs in found["paths"].values():
        for verb in verbs.values():
            for parameter in verb.get("parameters", []):
                parameter["schema"] |= {"enum": NAMES[parameter["name"]]} if parameter["name"] in NAMES else {}
    schema = schemathesis.openapi.from_dict(found)
    seen = 0
    strategies = []
    for operation in (result.ok() for result in schema.get_all_operations()):
        strategies.append(operation.as_strategy())
        if operation.body:
            strategies.append(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    for strategy in strategies:

        @hypothesis.settings(
            max_examples=CASES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=strategy)
        def ask(case: Any) -> None:
            nonlocal seen
            seen += 1
            response = case.call(base_url=f"http://{server.url('http')}")
            assert response.status_code != 500, response.text
            case.validate_response(response, checks=CHECKS)

        ask()
    assert seen > 2500
    with urllib.request.urlopen(f"http://{server.url('http')}/v2/health/live") as reply:
        assert reply.status == 200
