"""System shared memory: tritonclient's calls, both protocols, and what must be refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from tests.serve.running import add_engine, scaled, serving

MODULES = {"http": http_client, "grpc": grpc_client}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    add_engine(root, "m", scaled(2.0))
    with serving(root, allow_shared_memory=True) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def client(request, server):
    with MODULES[request.param].InferenceServerClient(server.url(request.param)) as made:
        made.module = MODULES[request.param]
        yield made
        made.unregister_system_shared_memory()


@pytest.fixture
def region():
    handle = shm.create_shared_memory_region("r", f"/venturi_test_{os.getpid()}", 64)
    yield handle
    shm.destroy_shared_memory_region(handle)


def key():
    return f"/venturi_test_{os.getpid()}"


def placed(module, size=16, offset=0):
    given = module.InferInput("x", [1, 4], "FP32")
    given.set_shared_memory("r", size, offset)
    return [given]


def test_inputs_and_outputs_in_shared_memory(client, region):
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    shm.set_shared_memory_region(region, [x])
    client.register_system_shared_memory("r", key(), 64)
    wanted = client.module.InferRequestedOutput("y")
    wanted.set_shared_memory("r", 16, 32)
    client.infer("m", placed(client.module), outputs=[wanted])
    np.testing.assert_array_equal(shm.get_contents_as_numpy(region, np.float32, [1, 4], 32), 2 * x)
    np.testing.assert_array_equal(client.infer("m", placed(client.module)).as_numpy("y"), 2 * x)
    np.testing.assert_array_equal(client.infer("m", placed(client.module, offset=32)).as_numpy("y"), 4 * x)


def test_registering_and_listing(client, region):
    client.register_system_shared_memory("r", key(), 32, offset=16)
    listed = client.get_system_shared_memory_status()
    rows = listed if isinstance(listed, list) else list(listed.regions.values())
    row = rows[0]
    get = row.get if isinstance(row, dict) else lambda n: getattr(row, n)
    assert (get("name"), get("key"), int(get("offset")), int(get("byte_size"))) == ("r", key(), 16, 32)
    with pytest.raises(InferenceServerException, match="already in manager"):
        client.register_system_shared_memory("r", key(), 32)
    client.unregister_system_shared_memory("r")
    with pytest.raises(InferenceServerException, match="Unable to find system shared memory region"):
        client.get_system_shared_memory_status("r")
    with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'r'"):
        client.infer("m", placed(client.module))


@pytest.mark.parametrize(
    "name, wrong, size, offset, text",
    [
        ("a", "/venturi_no_such_key", 16, 0, "Unable to open"),
        ("a", "/../etc/passwd", 16, 0, "not a name of shared memory"),
        ("a", "/..", 16, 0, "not a name of shared memory"),
        ("a", "", 16, 0, "not a name of shared memory"),
        ("a", None, 65, 0, "it has 64 bytes"),
        ("a", None, 16, 60, "it has 64 bytes"),
        ("a", None, 0, 0, "byte_size 0"),
        ("triton_python_backend_shm_region_1", None, 16, 0, "reserved"),
    ],
)
def test_regions_that_are_refused(client, region, name, wrong, size, offset, text):
    with pytest.raises(InferenceServerException, match=text):
        client.register_system_shared_memory(name, key() if wrong is None else wrong, size, offset=offset)


def test_tensors_beyond_their_region(client, region):
    client.register_system_shared_memory("r", key(), 16)
    for size, offset in ((16, 4), (20, 0), (1 << 40, 0)):
        with pytest.raises(InferenceServerException, match="Invalid offset"):
            client.infer("m", placed(client.module, size, offset))
    with pytest.raises(InferenceServerException, match="unexpected size for input 'x'"):
        client.infer("m", placed(client.module, 12))
    wanted = client.module.InferRequestedOutput("y")
    wanted.set_shared_memory("r", 12)
    with pytest.raises(InferenceServerException, match="should be at least 16 bytes"):
        client.infer("m", placed(client.module), outputs=[wanted])


def test_links_and_other_files_are_not_followed(client, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(64))
    link = f"/dev/shm/venturi_link_{os.getpid()}"
    os.symlink(tmp_path / "secret", link)
    try:
        with pytest.raises(InferenceServerException, match="Unable to open"):
            client.register_system_shared_memory("a", "/" + os.path.basename(link), 16)
    finally:
        os.unlink(link)


def test_it_is_off_by_default(tmp_path, region):
    add_engine(tmp_path, "m", scaled(2.0))
    with serving(tmp_path) as running:
        client = http_client.InferenceServerClient(running.url("http"))
        with pytest.raises(InferenceServerException, match="--allow-client-shm"):
            client.register_system_shared_memory("r", key(), 64)
        client.close()
