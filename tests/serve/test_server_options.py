"""Options that Triton's server has: addresses, readiness, retries, the log file, the gRPC listener, --flag=value."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from typer.testing import CliRunner

from tests.serve.running import DIGITS, add_engine, scaled, serving
from venturi.cli.main import app
from venturi.core.errors import ModelError
from venturi.core.log import logger
from venturi.serve.app import ServeConfig
from venturi.serve.grpc.settings import GrpcSettings
from venturi.serve.logs import LogSettings, ServerLog
from venturi.serve.repository import Mode


def broken(root, name):
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"no model")
    return folder / "model.onnx"


def test_a_listener_may_have_an_address_of_its_own(tmp_path):
    add_engine(tmp_path, "twice", scaled(2.0))
    with serving(tmp_path, hosts={"http": "127.0.0.2", "metrics": "127.0.0.3"}) as server:
        ports = server.running.ports
        assert http_client.InferenceServerClient(f"127.0.0.2:{ports['http']}").is_server_ready()
        assert grpc_client.InferenceServerClient(f"127.0.0.1:{ports['grpc']}").is_server_ready()
        socket.create_connection(("127.0.0.3", ports["metrics"]), 5).close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", ports["http"]), 5)


@pytest.mark.parametrize("strict", [True, False])
def test_readiness_with_a_model_that_cannot_be_served(tmp_path, strict):
    add_engine(tmp_path, "twice", scaled(2.0))
    broken(tmp_path, "broken")
    with serving(tmp_path, exit_on_error=False, strict_readiness=strict) as server:
        for module, kind in ((http_client, "http"), (grpc_client, "grpc")):
            client = module.InferenceServerClient(server.url(kind))
            assert client.is_server_ready() is not strict
            assert client.is_model_ready("twice")
        assert not http_client.InferenceServerClient(server.url("http")).is_model_ready("broken")


def test_a_model_is_loaded_again_that_could_not_be_loaded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("venturi.serve.repository.RETRY_S", 0.05)
    file = broken(tmp_path, "digits")
    monkeypatch.setattr(logger, "propagate", True)
    with serving(tmp_path, mode=Mode.EXPLICIT, load_retries=2) as server:
        client = http_client.InferenceServerClient(server.url("http"))
        with pytest.raises(Exception, match="failed to load 'digits'"):
            client.load_model("digits")
        assert [r.getMessage().split(":")[0] for r in caplog.records if "attempt" in r.getMessage()] == [
            f"model digits cannot be loaded (attempt {i})" for i in (1, 2)
        ]
        monkeypatch.setattr("venturi.serve.repository.RETRY_S", 2.0)
        threading.Timer(0.5, lambda: file.write_bytes(DIGITS.read_bytes())).start()
        client.load_model("digits")
        assert client.is_model_ready("digits")


def test_the_log_in_a_file(tmp_path):
    log = ServerLog(LogSettings(log_file=str(tmp_path / "log.txt"), log_warning=False))
    log.start()
    try:
        logger.info("one")
        logger.warning("two")
    finally:
        log.stop()
    written = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.rsplit("] ", 1)[1] for line in written] == ["one"]
    with pytest.raises(ModelError, match="log file"):
        ServerLog(LogSettings(log_file=str(tmp_path / "nowhere/log.txt"))).start()


def test_a_log_file_that_cannot_be_written_any_more(tmp_path, capsys):
    folder = tmp_path / "logs"
    folder.mkdir()
    log = ServerLog(LogSettings(log_file=str(folder / "log.txt")))
    log.start()
    try:
        (folder / "log.txt").unlink()
        folder.rmdir()
        logger.info("still said")
    finally:
        log.stop()
    said = capsys.readouterr().err
    assert "still said" in said
    assert "cannot be written" in said


def counted_bytes(port: int) -> tuple[int, list[int]]:
    """A forwarder to a port: its own port, and the bytes that came back so far."""
    listener, back = socket.create_server(("127.0.0.1", 0)), [0]

    def pump(source: socket.socket, target: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            while data := source.recv(1 << 16):
                back[0] += len(data) * counts
                target.sendall(data)

    def run() -> None:
        here, _ = listener.accept()
        there = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=pump, args=(here, there, False), daemon=True).start()
        pump(there, here, True)

    threading.Thread(target=run, daemon=True).start()
    return listener.getsockname()[1], back


@pytest.mark.parametrize("level", ["none", "high"])
def test_compressed_answers_over_grpc(tmp_path, level):
    add_engine(tmp_path, "twice", scaled(2.0, 16384))
    with serving(tmp_path, grpc=GrpcSettings(compression=level)) as server:
        port, back = counted_bytes(server.running.ports["grpc"])
        x = np.zeros((1, 16384), np.float32)
        given = grpc_client.InferInput("x", list(x.shape), "FP32")
        given.set_data_from_numpy(x)
        with grpc_client.InferenceServerClient(f"127.0.0.1:{port}") as client:
            answer = client.infer("twice", [given]).as_numpy("y")
        assert answer.shape == x.shape
        assert not answer.any()
        assert back[0] > x.nbytes if level == "none" else back[0] < x.nbytes / 8


def test_the_grpc_listener_settings():
    found = dict(GrpcSettings(5000, 700, True, 60_000, 900).options())
    assert found["grpc.keepalive_time_ms"] == 5000
    assert found["grpc.keepalive_timeout_ms"] == 700
    assert found["grpc.keepalive_permit_without_calls"] == 1
    assert found["grpc.max_connection_age_ms"] == 60_000
    assert found["grpc.max_connection_age_grace_ms"] == 900
    assert "grpc.max_connection_age_ms" not in dict(GrpcSettings().options())
    with pytest.raises(ModelError, match="none, low, medium, high"):
        GrpcSettings(compression="most")


def test_a_connection_ends_at_its_age(tmp_path):
    add_engine(tmp_path, "twice", scaled(2.0))
    with serving(tmp_path, grpc=GrpcSettings(max_connection_age_ms=300, max_connection_age_grace_ms=100)) as server:
        bare = socket.create_connection(("127.0.0.1", server.running.ports["grpc"]), 20)
        bare.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        bare.settimeout(20)
        while bare.recv(4096):
            pass  # until the server closes


def test_flags_with_values_as_triton_takes_them(monkeypatch):
    seen = []

    def run(config: ServeConfig, ready):
        async def nothing() -> bool:
            seen.append(config)
            return True

        return nothing()

    monkeypatch.setattr("venturi.serve.app.run_until_signal", run)
    arguments = ["--model-repository", str(DIGITS), "--allow-grpc=false", "--allow-client-shm=true", "--log-info=0",
                 "--exit-on-error=False", "--strict-readiness=false", "--http-address=127.0.0.1", "--http-port=0",
                 "--grpc-keepalive-time=9000", "--model-load-retry-count=3", "--disable-auto-complete-config=true"]  # fmt: skip
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 0, done.output
    (config,) = seen
    assert config.grpc_port is None
    assert config.allow_shared_memory
    assert not config.log.log_info
    assert not config.exit_on_error
    assert not config.strict_readiness
    assert not config.complete_config
    assert (config.address("http"), config.address("grpc")) == ("127.0.0.1", "0.0.0.0")
    assert config.grpc.keepalive_time_ms == 9000
    assert config.load_retries == 3
    for wrong in ("--allow-http=maybe", "--disable-auto-complete-config=false"):
        assert CliRunner().invoke(app, ["serve", str(DIGITS), wrong]).exit_code == 2


def test_the_command_says_where_the_dashboard_is(tmp_path):
    command = [sys.executable, "-m", "venturi", "serve", str(DIGITS), "--host", "127.0.0.1", "--http-port", "0",
               "--grpc-port", "0", "--metrics-port", "0", "--log-file", str(tmp_path / "log")]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            line = next(line for line in lines if line.startswith("dashboard"))
            assert line.split()[1].startswith("http://127.0.0.1:")
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert "model digits is ready" in (tmp_path / "log").read_text()
