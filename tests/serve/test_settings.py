"""Trace and log settings, and models that come with the request to load them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from google.protobuf.json_format import MessageToDict
from tritonclient.utils import InferenceServerException

import venturi as vt
from tests.serve.running import add_engine, scaled, serving
from tests.serve.test_ensembles import CHAIN, add_ensemble, ensemble
from tests.serve.test_python_models import ADD_SUB
from venturi.core.log import logger
from venturi.serve.errors import ServeError
from venturi.serve.repository import Mode
from venturi.serve.tracing import TraceSettings, parse_trace_config

MODULES = {"http": http_client, "grpc": grpc_client}


@pytest.fixture(params=["http", "grpc"])
def setup(request, tmp_path):
    add_engine(tmp_path, "m", scaled(2.0))
    add_engine(tmp_path, "other", scaled(3.0))
    trace = TraceSettings(rate=1, file=str(tmp_path / "trace.json"))
    with serving(tmp_path, mode=Mode.EXPLICIT, load=("*",), trace=trace) as server:
        module = MODULES[request.param]
        client = module.InferenceServerClient(server.url(request.param))
        client.module, client.folder = module, tmp_path
        yield client, server
        client.close()


def ask(client, model: str = "m", request_id: str = "", rows: int = 1):
    x = client.module.InferInput("x", [rows, 4], "FP32")
    x.set_data_from_numpy(np.ones((rows, 4), np.float32))
    return client.infer(model, [x], request_id=request_id).as_numpy("y")


def settings_of(client, model=None) -> dict:
    found = client.get_trace_settings(model)
    if isinstance(found, dict):
        return found
    plain = MessageToDict(found, preserving_proto_field_name=True)["settings"]
    return {k: v["value"] if k == "trace_level" else v["value"][0] for k, v in plain.items()}


def test_traces_show_the_way_of_a_request(setup) -> None:
    client, _ = setup
    ask(client, request_id="before")
    client.update_trace_settings("m", {"trace_level": ["TIMESTAMPS"], "trace_count": "2"})
    assert settings_of(client, "m")["trace_level"] == ["TIMESTAMPS"]
    assert settings_of(client)["trace_level"] == ["OFF"]
    for name in ("a", "b", "c"):
        ask(client, request_id=name)
    ask(client, "other")
    client.update_trace_settings("m", {"trace_level": None, "trace_count": None})
    assert settings_of(client, "m") == settings_of(client)
    ask(client, request_id="after")
    written = json.loads((client.folder / "trace.json").read_text())
    assert [t["request_id"] for t in written if "request_id" in t] == ["a", "b"]
    for moments in (t["timestamps"] for t in written if "timestamps" in t):
        assert [m["name"] for m in moments][:3] == ["REQUEST_START", "QUEUE_START", "COMPUTE_START"]
        assert [m["ns"] for m in moments] == sorted(m["ns"] for m in moments)


def test_rate_and_frequency(setup) -> None:
    client, _ = setup
    client.update_trace_settings(None, {"trace_level": ["TIMESTAMPS"], "trace_rate": "3", "log_frequency": "2"})
    for _ in range(13):
        ask(client)
    files = sorted(p.name for p in client.folder.glob("trace.json.*"))
    assert files == ["trace.json.0", "trace.json.1"]
    assert all(len(json.loads((client.folder / f).read_text())) == 4 for f in files)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trace_file": "/tmp/x"}, "can not be updated"),
        ({"trace_level": ["LOUD"]}, "trace_level"),
        ({"trace_rate": "0"}, "from 1 on"),
        ({"trace_count": "many"}, "from -1 on"),
        ({"nonsense": "1"}, "unexpected trace setting 'nonsense'"),
    ],
)
def test_bad_trace_settings_change_nothing(setup, settings, says) -> None:
    client, _ = setup
    before = settings_of(client)
    with pytest.raises(InferenceServerException, match=re.escape(says)):
        client.update_trace_settings(None, {"trace_level": ["TIMESTAMPS"], **settings})
    assert settings_of(client) == before
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.get_trace_settings("nobody")


def test_trace_options_of_the_command_line() -> None:
    given = ["mode=triton", "level=TIMESTAMPS", "rate=5", "count=7", "triton,file=/t", "triton,log-frequency=9"]
    assert parse_trace_config(given) == TraceSettings("TIMESTAMPS", 5, 7, 9, "/t")
    for bad in ("loud=1", "rate=x", "level=ALL"):
        with pytest.raises(ServeError):
            parse_trace_config([bad])


def test_log_settings(setup, capfd) -> None:
    client, _ = setup
    client.update_log_settings({"log_info": False, "log_verbose_level": 1, "log_format": "ISO8601"})
    found = client.get_log_settings()
    if not isinstance(found, dict):
        plain = MessageToDict(found, preserving_proto_field_name=True)["settings"]
        found = {k: next(iter(v.values())) for k, v in plain.items()}
    assert found["log_info"] is False
    assert found["log_verbose_level"] == 1
    assert found["log_format"] == "ISO8601"
    capfd.readouterr()
    logger.info("not this")
    logger.debug("but this")
    logger.warning("and this")
    said = capfd.readouterr().err
    assert "not this" not in said
    assert re.search(r"^\d{4}-\d\d-\d\dT[\d:]+Z V \d+ test_settings.py:\d+\] but this$", said, re.MULTILINE)
    assert "and this" in said
    refused = [
        ({"log_file": "x"}, "can not be updated"),
        ({"log_loud": True}, "unexpected"),
        ({"log_format": "XML"}, "one of"),
    ]
    if client.module is http_client:  # the gRPC client turns values into what they should be
        refused.append(({"log_info": 3}, "must be a bool"))
    for bad, says in refused:
        with pytest.raises(InferenceServerException, match=says):
            client.update_log_settings(bad)


def test_a_log_of_json(setup, capfd) -> None:
    client, _ = setup
    client.update_log_settings({"log_format": "json"})
    capfd.readouterr()
    logger.warning('two\nlines and a "quote" of %s', "\u00e4")
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError:
        logger.exception("it failed")
    client.update_log_settings({"log_format": "default"})
    ours = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    first, second = (line for line in ours if line["place"].startswith("test_settings.py:"))
    assert first["message"] == 'two\nlines and a "quote" of \u00e4'
    assert first["level"] == "warning"
    assert first["process"] == os.getpid()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["time"])
    assert "exception" not in first
    assert second["level"] == "error"
    assert second["exception"].endswith("ZeroDivisionError: why")


def engine_bytes(folder: Path, factor: float) -> bytes:
    path = folder / f"{factor}.vt"
    vt.build(scaled(factor), opt_level=0, device="cpu").save(path)
    return path.read_bytes()


def test_a_model_is_uploaded_replaced_and_forgotten(setup) -> None:
    client, server = setup
    config = json.dumps({"max_batch_size": 4})
    files = {"file:1/model.vt": engine_bytes(client.folder.parent, 5.0)}
    client.load_model("new", config=config, files=files)
    assert ask(client, "new")[0, 0] == 5
    client.load_model("new", config=config, files={"file:2/model.vt": engine_bytes(client.folder.parent, 7.0)})
    assert ask(client, "new")[0, 0] == 7
    client.load_model("new")
    assert ask(client, "new")[0, 0] == 7
    client.load_model("m", config=config, files=files)
    assert ask(client, "m")[0, 0] == 5
    client.unload_model("m")
    client.load_model("m")
    assert ask(client, "m")[0, 0] == 2
    client.unload_model("new")
    with pytest.raises(InferenceServerException, match="no such model"):
        client.load_model("new")
    root = server.running.core.repository._uploads._root
    assert root is not None
    assert not any(root.iterdir())


def test_a_failed_upload_leaves_what_serves(setup) -> None:
    client, _ = setup
    with pytest.raises(InferenceServerException, match="failed to load 'm'"):
        client.load_model("m", config="{}", files={"file:1/model.vt": b"no engine"})
    assert ask(client, "m")[0, 0] == 2
    for path in ("../../escape.py", "/etc/x", "1/../../y"):
        with pytest.raises(InferenceServerException, match="leaves the model's folder"):
            client.load_model("m", config="{}", files={f"file:{path}": b"x"})
    with pytest.raises(InferenceServerException, match="no 'config'"):
        client.load_model("m", files={"file:1/model.vt": b"x"})


def test_an_uploaded_python_model(setup) -> None:
    import textwrap

    client, _ = setup
    files = {"file:1/model.py": textwrap.dedent(ADD_SUB).encode()}
    client.load_model("py", config=json.dumps({"backend": "python"}), files=files)
    inputs = []
    for name in "ab":
        inputs.append(client.module.InferInput(name, [1, 3], "FP32"))
        inputs[-1].set_data_from_numpy(np.ones((1, 3), np.float32))
    assert client.infer("py", inputs).as_numpy("sum")[0, 0] == 2


def test_unloading_an_ensemble_with_its_steps(tmp_path) -> None:
    add_engine(tmp_path, "double", scaled(2.0))
    add_engine(tmp_path, "triple", scaled(3.0))
    add_ensemble(tmp_path, "chain", ensemble(CHAIN))
    with serving(tmp_path, mode=Mode.EXPLICIT, load=("chain",)) as server:
        for kind, module in MODULES.items():
            client = module.InferenceServerClient(server.url(kind))
            client.load_model("chain")
            client.unload_model("chain")
            assert client.is_model_ready("double")
            client.load_model("chain")
            client.unload_model("chain", unload_dependents=True)
            assert server.running.core.repository.ready_versions("double") == []
            client.close()


def test_bad_base64_is_refused(setup) -> None:
    import urllib.error
    import urllib.request

    _, server = setup
    body = json.dumps({"parameters": {"config": "{}", "file:1/model.vt": "***"}}).encode()
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://{server.url('http')}/v2/repository/models/m/load", body)
    assert error.value.code == 400
    assert "must be base64" in error.value.read().decode()
