"""The dashboard in headless Chromium: models, live figures, the engine's layers, load and unload, the playground."""

from __future__ import annotations

import json
import threading
import urllib.request

import numpy as np
import pytest
import tritonclient.http as http_client

from tests.serve.chromium import PROGRAM, Page
from tests.serve.running import DIGITS, add_engine, scaled, serving
from venturi.serve.repository import Mode

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("dashboard")
    (root / "digits" / "1").mkdir(parents=True)
    (root / "digits" / "1" / "model.onnx").write_bytes(DIGITS.read_bytes())
    add_engine(root, "double", scaled(2.0))
    add_engine(root, EVIL, scaled(2.0))
    with serving(root, mode=Mode.EXPLICIT, load=("digits", EVIL)) as running:
        yield running


def test_the_page_is_served_with_a_policy(server) -> None:
    for path in ("/", "/dashboard"):
        with urllib.request.urlopen(f"http://{server.url('http')}{path}") as reply:
            assert reply.headers["content-type"] == "text/html; charset=utf-8"
            assert "default-src 'none'" in reply.headers["content-security-policy"]
            page = reply.read().decode()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_inspect(server) -> None:
    with urllib.request.urlopen(f"http://{server.url('http')}/v2/models/digits/inspect") as reply:
        found = json.loads(reply.read())
    assert found["layers"]
    assert all(layer["tactic"] for layer in found["layers"])


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; `make chromium` installs Debian's where it can")
def test_a_user_looks_around(server) -> None:
    stop = threading.Event()

    def load() -> None:
        with http_client.InferenceServerClient(server.url("http")) as client:
            image = http_client.InferInput("image", [3, 1, 8, 8], "FP32")
            image.set_data_from_numpy(np.zeros((3, 1, 8, 8), np.float32))
            while not stop.wait(0.01):
                client.infer("digits", [image])

    thread = threading.Thread(target=load)
    thread.start()
    page = Page(f"http://{server.url('http')}/#model=digits")
    try:
        names = page.wait("[...document.querySelectorAll('tr.model')].map(r => r.cells[0].textContent).join('|')")
        assert EVIL in names.split("|")
        assert page.evaluate("document.images.length") == 0
        assert page.wait("document.getElementById('chosen').textContent") == "digits, version 1"
        assert page.wait("document.getElementById('layers').rows.length") > 3
        assert page.wait("parseFloat(document.getElementById('value-rate').textContent) > 1")
        assert page.wait("document.getElementById('value-batch').textContent") == "3.00"
        assert page.wait("document.getElementById('path-latency').getAttribute('d').includes('L')")
        page.evaluate("document.getElementById('send').click()")
        answer = json.loads(page.wait("document.getElementById('response').textContent"))
        assert len(answer["outputs"][0]["data"]) == 10
        page.evaluate("document.getElementById('request').value = '{}'; document.getElementById('send').click()")
        assert "inputs" in page.wait("document.querySelector('#response.bad').textContent")
        row = "[...document.querySelectorAll('tr.model')].find(r => r.cells[0].textContent === 'double')"
        page.evaluate(f"{row}.querySelector('button').click()")
        page.wait(f"{row}.cells[2].textContent === 'READY'")
        page.evaluate(f"{row}.querySelector('button').click()")
        page.wait(f"{row}.cells[2].textContent === 'UNAVAILABLE'")
        assert page.errors == []
    finally:
        page.close()
        stop.set()
        thread.join()
