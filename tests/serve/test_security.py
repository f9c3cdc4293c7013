"""API keys, restricted APIs and TLS, as clients meet them."""

from __future__ import annotations

import queue
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.serve.running import add_engine, scaled, serving
from venturi.core.errors import ModelError
from venturi.serve.errors import ServeError
from venturi.serve.http.routes import ROUTES
from venturi.serve.security import APIS, Gate, Restriction, http_api, parse_restriction, read_keys
from venturi.serve.tls import Tls

KEYS = ("sesame", "open-now")


def ask(module, client, **options):
    x = module.InferInput("x", [1, 4], "FP32")
    x.set_data_from_numpy(np.ones((1, 4), np.float32))
    return client.infer("m", [x], **options).as_numpy("y")[0, 0]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("secured")
    add_engine(root, "m", scaled(2.0))
    return root


@pytest.fixture(scope="module")
def locked(repository):
    with serving(repository, gate=Gate(KEYS)) as server:
        yield server


@pytest.mark.parametrize("headers", [{"authorization": "Bearer sesame"}, {"x-api-key": "open-now"}])
def test_a_key_opens(locked, headers) -> None:
    with http_client.InferenceServerClient(locked.url("http")) as client:
        assert ask(http_client, client, headers=dict(headers)) == 2
        assert client.get_model_metadata("m", headers=dict(headers))["name"] == "m"
    with grpc_client.InferenceServerClient(locked.url("grpc")) as client:
        assert ask(grpc_client, client, headers=dict(headers)) == 2


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}, {"x-api-key": ""}]
)
def test_without_a_key_only_health_and_the_empty_page_answer(locked, headers) -> None:
    with http_client.InferenceServerClient(locked.url("http")) as client:
        assert client.is_server_ready(headers=dict(headers))
        for call in (
            lambda: ask(http_client, client, headers=dict(headers)),
            lambda: client.get_model_repository_index(headers=dict(headers)),
        ):
            with pytest.raises(InferenceServerException, match="API key is needed"):
                call()
    with urllib.request.urlopen(f"http://{locked.url('http')}/") as reply:
        assert reply.status == 200
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{locked.url('http')}/v2/models/m/inspect")
    assert refused.value.code == 401
    assert refused.value.headers["www-authenticate"] == "Bearer"
    with grpc_client.InferenceServerClient(locked.url("grpc")) as client:
        assert client.is_server_live(headers=dict(headers))
        for call in (
            lambda: ask(grpc_client, client, headers=dict(headers)),
            lambda: client.get_server_metadata(headers=dict(headers)),
        ):
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED.*API key is needed"):
                call()
        seen: queue.Queue = queue.Queue()
        client.start_stream(lambda result, error: seen.put(error), headers=dict(headers))
        assert "API key is needed" in str(seen.get(timeout=10))


def test_restricted_apis_expect_their_header(repository) -> None:
    rule = Restriction(frozenset({"model-repository", "inference"}), "admin-key", "s3cret")
    with serving(repository, gate=Gate((), (rule,), (rule,))) as server:
        with http_client.InferenceServerClient(server.url("http")) as client:
            assert client.get_model_metadata("m")["name"] == "m"
            with pytest.raises(InferenceServerException, match="This API is restricted, expecting header 'admin-key'"):
                client.get_model_repository_index()
            assert ask(http_client, client, headers={"Admin-Key": "s3cret"}) == 2
        with grpc_client.InferenceServerClient(server.url("grpc")) as client:
            assert client.get_server_metadata().name == "venturi"
            with pytest.raises(
                InferenceServerException, match="UNAVAILABLE.*expecting header 'triton-grpc-protocol-admin-key'"
            ):
                ask(grpc_client, client)
            assert ask(grpc_client, client, headers={"triton-grpc-protocol-admin-key": "s3cret"}) == 2


def test_every_route_belongs_to_an_api() -> None:
    paths = [tuple("x" if part is None else part for part in route.path) for route in ROUTES]
    found = {path: http_api(path) for path in paths}
    assert set(found.values()) <= {*APIS, "page"}
    assert {path for path, api in found.items() if api == "page"} == {("",), ("dashboard",)}
    health = {path for path, api in found.items() if api == "health"}
    assert all(path[-1] in ("live", "ready") for path in health)
    assert found["v2", "repository", "models", "x", "load"] == "model-repository"
    assert http_api(["v2", "models", "m", "versions", "1", "infer"]) == "inference"


@pytest.mark.parametrize("text", ["inference", "inference:key", "inference:=v", "nonsense:k=v", ":k=v"])
def test_bad_restrictions(text: str) -> None:
    with pytest.raises(ServeError, match="a restriction must be"):
        parse_restriction(text)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\none\n  two  \n")
    assert read_keys(path) == ("one", "two")
    path.write_text("# none\n")
    with pytest.raises(ModelError, match="holds no API key"):
        read_keys(path)
    with pytest.raises(ModelError, match="cannot read"):
        read_keys(tmp_path / "gone")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A CA, a server's and a client's certificate."""
    root = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=root, check=True, capture_output=True)

    openssl(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=ca",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
    )
    (root / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            f"/CN={name}",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
        )
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-extfile", "names", "-out", f"{name}.pem")  # fmt: skip
    return root


def test_tls(repository, certificates) -> None:
    tls = Tls(certificates / "server.pem", certificates / "server.key")
    with serving(repository, tls=tls) as server:
        options = {"ca_certs": str(certificates / "ca.pem")}
        with http_client.InferenceServerClient(server.url("http"), ssl=True, ssl_options=options) as client:
            assert ask(http_client, client) == 2
        roots = str(certificates / "ca.pem")
        with grpc_client.InferenceServerClient(server.url("grpc"), ssl=True, root_certificates=roots) as client:
            assert ask(grpc_client, client) == 2
        with pytest.raises(OSError), urllib.request.urlopen(f"http://{server.url('http')}/v2/health/live", timeout=5):
            pass


def test_mutual_tls(repository, certificates) -> None:
    tls = Tls(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    with serving(repository, tls=tls) as server:
        roots = str(certificates / "ca.pem")
        own = {"private_key": str(certificates / "client.key"), "certificate_chain": str(certificates / "client.pem")}
        with grpc_client.InferenceServerClient(server.url("grpc"), ssl=True, root_certificates=roots, **own) as client:
            assert ask(grpc_client, client) == 2
        without = grpc_client.InferenceServerClient(server.url("grpc"), ssl=True, root_certificates=roots)
        with without, pytest.raises(InferenceServerException):
            ask(grpc_client, without, client_timeout=5)
        options = {"ca_certs": roots, "keyfile": own["private_key"], "certfile": own["certificate_chain"]}
        with http_client.InferenceServerClient(server.url("http"), ssl=True, ssl_options=options) as client:
            assert ask(http_client, client) == 2


def test_certificates_that_cannot_be_used(certificates, tmp_path) -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        Tls(certificates / "server.pem", certificates / "client.key")
    with pytest.raises(ModelError, match="cannot be used"):
        Tls(tmp_path / "gone.pem", tmp_path / "gone.key")
