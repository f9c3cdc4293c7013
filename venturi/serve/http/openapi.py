"""The HTTP interface as an OpenAPI 3.1 document: paths from the route table, bodies from the protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import venturi as vt

if TYPE_CHECKING:
    from venturi.serve.http.routes import Route

Schema = dict[str, Any]
PARAMETERS: Schema = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
TENSOR: Schema = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {
            "enum": [
                "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32",
                "FP64", "BF16", "BYTES",
            ]
        },
        "parameters": PARAMETERS,
        "data": {"type": "array", "description": "Flat or nested; absent for binary tensors and shared memory."},
    },
}  # fmt: skip
REQUESTED: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "parameters": PARAMETERS},
}
INFER: Schema = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": PARAMETERS,
        "inputs": {"type": "array", "items": TENSOR},
        "outputs": {"type": "array", "items": REQUESTED},
    },
}
INFERRED: Schema = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "id": {"type": "string"},
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "parameters": {"type": "object"},
        "outputs": {"type": "array", "items": {"type": "object", "required": ["name", "shape", "datatype"]}},
    },
}
ERROR: Schema = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
REGION: Schema = {
    "type": "object",
    "required": ["key", "byte_size"],
    "properties": {
        "key": {"type": "string"},
        "offset": {"type": "integer", "minimum": 0},
        "byte_size": {"type": "integer", "minimum": 0},
    },
}
LOAD: Schema = {
    "type": "object",
    "properties": {
        "parameters": {
            "type": "object",
            "properties": {"config": {"type": "string", "description": "A model configuration, as JSON text."}},
            "additionalProperties": {"type": "string", "description": "file:VERSION/NAME, base64"},
        }
    },
}
UNLOAD: Schema = {
    "type": "object",
    "properties": {"parameters": {"type": "object", "properties": {"unload_dependents": {"type": "boolean"}}}},
}
INDEX: Schema = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
OBJECT: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": OBJECT}
# By the last literal parts of a path: what it does, its request body if it takes one, and what answers it, if not an
# object. An empty answer is None.
_ABOUT: dict[tuple[str, ...], tuple[str, Schema | None, Schema | None]] = {
    ("live",): ("Whether the server runs", None, None),
    ("health", "ready"): ("Whether the server and all its models are ready", None, None),
    ("ready",): ("Whether a model is ready", None, None),
    ("v2",): ("Name, version and extensions of the server", None, OBJECT),
    ("config",): ("The model's configuration, completed", None, OBJECT),
    ("stats",): ("Counts and durations of requests and batches", None, OBJECT),
    ("inspect",): ("Layers, tactics and times of the engine", None, OBJECT),
    ("setting",): ("Trace settings; POST changes those it names", OBJECT, OBJECT),
    ("logging",): ("Log settings; POST changes those it names", OBJECT, OBJECT),
    ("index",): ("Models of the repository and their state", INDEX, OBJECTS),
    ("load",): ("Load or reload a model", LOAD, None),
    ("unload",): ("Unload a model when its requests are done", UNLOAD, None),
    ("register",): ("Name a region of shared memory", REGION, None),
    ("unregister",): ("Forget a region, or all of them", None, None),
    ("status",): ("Registered regions", None, OBJECTS),
    ("dashboard",): ("The dashboard", None, None),
    ("openapi.json",): ("This document", None, OBJECT),
    ("models",): ("Inputs and outputs of a model", None, OBJECT),
    ("versions",): ("Inputs and outputs of a version of a model", None, OBJECT),
    ("infer",): ("Run a model", INFER, INFERRED),
    ("generate",): ("Run a model on flat JSON", OBJECT, OBJECT),
    ("generate_stream",): ("Run a model on flat JSON; answers are server-sent events", OBJECT, None),
}  # fmt: skip
_NAMES = {"models": "model", "versions": "version", "region": "region", "repository": "repository"}
_MODEL = ("v2", "models", None)
INFERENCE = tuple(
    (*base, verb) for base in (_MODEL, (*_MODEL, "versions", None)) for verb in ("infer", "generate", "generate_stream")
)


def document(routes: tuple[Route, ...]) -> dict[str, Any]:
    """OpenAPI 3.1 of `routes` and inference."""
    paths: dict[str, Any] = {}
    for route in routes:
        for method in route.methods:
            paths.setdefault(template(route.path), {})[method.lower()] = _operation(route.path, method)
    for path in INFERENCE:
        paths[template(path)] = {"post": _operation(path, "POST")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Venturi inference server", "version": vt.__version__, "description": "KServe v2 over HTTP."},
        "paths": paths,
    }


def template(path: tuple[str | None, ...]) -> str:
    """
    >>> template(("v2", "models", None, "versions", None, "stats"))
    '/v2/models/{model}/versions/{version}/stats'
    """
    return "/" + "/".join(f"{{{_NAMES[path[i - 1] or '']}}}" if p is None else p for i, p in enumerate(path))


def _operation(path: tuple[str | None, ...], method: str) -> dict[str, Any]:
    literal = tuple(p for p in path if p is not None)
    summary, body, answer = _ABOUT.get(literal[-2:]) or _ABOUT.get(literal[-1:]) or ("The dashboard", None, None)
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": _answer(literal, answer)}}
    names = [_NAMES[path[i - 1] or ""] for i, p in enumerate(path) if p is None]
    if names:
        text = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": n, "in": "path", "required": True, "schema": text} for n in names]
    if body is not None and method == "POST":
        operation["requestBody"] = {"content": _content(body), "required": bool(body.get("required"))}
    for status in _statuses(literal, method):
        operation["responses"][status] = {"description": "Refused", "content": _content(ERROR)}
    if literal[-2:] == ("health", "ready"):
        operation["responses"]["400"] = {"description": "Not ready"}
    return operation


def _answer(literal: tuple[str, ...], answer: Schema | None) -> dict[str, Any]:
    if literal[-1] in ("", "dashboard"):
        return {"description": "A page", "content": {"text/html": {}}}
    if literal[-1] == "generate_stream":
        return {"description": "Events", "content": {"text/event-stream": {}}}
    if answer is None:
        return {"description": "Done"}
    found = _content(answer)
    if literal[-1] == "infer":
        found["application/octet-stream"] = {}
    return {"description": "Answer", "content": found}


def _statuses(literal: tuple[str, ...], method: str) -> list[str]:
    """Besides 200: 401 and 403 by the server's keys, 503 when it is full or stops, 501 for what it does not know."""
    refused = ["401", "403", "503"]
    if "models" in literal or "region" in literal:
        refused += ["400", "404"]
    if method == "POST":
        refused += ["400", "500", "501"]
    return sorted(set(refused))


def _content(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
