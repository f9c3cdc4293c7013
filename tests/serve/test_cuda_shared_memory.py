"""CUDA shared memory: both protocols' calls against a driver that keeps device memory in numpy arrays. The real driver's
turn is tests/gpu/test_cuda_shared_memory.py."""

from __future__ import annotations

import base64
import ctypes as C
import gc

import numpy as np
import orjson
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import urllib3
from tritonclient.utils import InferenceServerException

from tests.serve.running import add_engine, scaled, serving
from venturi.serve.cuda_memory import CudaMemory
from venturi.serve.errors import ServeError
from venturi.serve.shared_memory import Kind, Regions

MODULES = {"http": http_client, "grpc": grpc_client}
BASE = 0x7F0000000000


class FakeDriver:
    """Two devices; every handle is 64 times one byte and shows an allocation of 256 bytes. Pointers are checked."""

    def __init__(self):
        self.memory = {i: np.zeros(256, np.uint8) for i in range(1, 4)}
        self.mapped, self.contexts = set(), []

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 100 + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        self.contexts.pop()
        return 0

    def cuIpcOpenMemHandle_v2(self, address, handle, flags):
        assert self.contexts
        raw = bytes(handle)
        if raw[0] not in self.memory or raw != raw[:1] * 64:
            return 400
        self.mapped.add(raw[0])
        address._obj.value = BASE + raw[0] * 4096
        return 0

    def cuMemGetAddressRange_v2(self, start, size, address):
        start._obj.value, size._obj.value = address.value, 256
        return 0

    def cuIpcCloseMemHandle(self, address):
        self.mapped.remove((address.value - BASE) // 4096)
        return 0

    def _at(self, address, size):
        assert self.contexts, "no device is current"
        which, offset = divmod(address.value - BASE, 4096)
        assert which in self.mapped
        assert 0 <= offset <= offset + size.value <= 256
        return self.memory[which][offset : offset + size.value]

    def cuMemcpyDtoH_v2(self, to, address, size):
        C.memmove(to, self._at(address, size).tobytes(), size.value)
        return 0

    def cuMemcpyHtoD_v2(self, address, data, size):
        self._at(address, size)[:] = np.frombuffer(C.string_at(data.value, size.value), np.uint8)
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = b"invalid resource handle"
        return 0


def handle(which):
    return base64.b64encode(bytes([which]) * 64)


@pytest.fixture(scope="module")
def driver():
    return FakeDriver()


@pytest.fixture(scope="module")
def server(tmp_path_factory, driver):
    root = tmp_path_factory.mktemp("repository")
    add_engine(root, "m", scaled(2.0))
    with serving(root, allow_shared_memory=True) as running:
        running.running.core.regions = Regions(True, CudaMemory(driver))
        yield running


@pytest.fixture(params=["http", "grpc"])
def client(request, server):
    with MODULES[request.param].InferenceServerClient(server.url(request.param)) as made:
        made.module = MODULES[request.param]
        yield made
        made.unregister_cuda_shared_memory()


def test_inputs_and_outputs_on_a_device(client, driver):
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    driver.memory[1][16:32] = x.view(np.uint8).reshape(-1)
    client.register_cuda_shared_memory("in", handle(1), 0, 64)
    client.register_cuda_shared_memory("out", handle(2), 1, 256)
    given = client.module.InferInput("x", [1, 4], "FP32")
    given.set_shared_memory("in", 16, 16)
    wanted = client.module.InferRequestedOutput("y")
    wanted.set_shared_memory("out", 16, 240)
    client.infer("m", [given], outputs=[wanted])
    np.testing.assert_array_equal(driver.memory[2][240:].view(np.float32), 2 * x[0])
    wanted.set_shared_memory("out", 16, 241)
    with pytest.raises(InferenceServerException, match="Invalid offset"):
        client.infer("m", [given], outputs=[wanted])


def test_registering_and_listing(client, driver):
    client.register_cuda_shared_memory("r", handle(3), 1, 128)
    listed = client.get_cuda_shared_memory_status()
    row = listed[0] if isinstance(listed, list) else listed.regions["r"]
    get = row.get if isinstance(row, dict) else lambda n: getattr(row, n)
    assert (get("name"), int(get("device_id")), int(get("byte_size"))) == ("r", 1, 128)
    with pytest.raises(InferenceServerException, match="already in manager"):
        client.register_cuda_shared_memory("r", handle(2), 0, 64)
    with pytest.raises(InferenceServerException, match="Unable to find system shared memory region: 'r'"):
        client.get_system_shared_memory_status("r")
    client.unregister_system_shared_memory("r")
    client.get_cuda_shared_memory_status("r")
    client.unregister_cuda_shared_memory("r")
    with pytest.raises(InferenceServerException, match="Unable to find cuda shared memory region: 'r'"):
        client.get_cuda_shared_memory_status("r")
    gc.collect()
    assert not driver.mapped
    assert not driver.contexts


@pytest.mark.parametrize(
    "name, raw, device, size, text",
    [
        ("a", base64.b64encode(b"short"), 0, 16, "has 5 bytes, a cudaIpcMemHandle_t has 64"),
        ("a", handle(9), 0, 16, r"cuIpcOpenMemHandle_v2: invalid resource handle \(400\)"),
        ("a", handle(1), 2, 16, "device_id 2, this machine has 2 CUDA devices"),
        ("a", handle(1), -1, 16, "device_id -1"),
        ("a", handle(1), 0, 257, "it has 256 bytes, byte_size is 257"),
        ("a", handle(1), 0, 0, "byte_size 0"),
        ("triton_python_backend_shm_region_1", handle(1), 0, 16, "reserved"),
    ],
)
def test_regions_that_are_refused(client, driver, name, raw, device, size, text):
    with pytest.raises(InferenceServerException, match=text):
        client.register_cuda_shared_memory(name, raw, device, size)
    gc.collect()
    assert not driver.mapped


@pytest.mark.parametrize(
    "body, text",
    [
        ({"raw_handle": {"b64": "?"}, "device_id": 0, "byte_size": 16}, "'b64' of 'raw_handle'"),
        ({"raw_handle": "AAAA", "device_id": 0, "byte_size": 16}, "an object with 'b64'"),
        ({"raw_handle": {"b64": "AAAA"}, "byte_size": 16}, "'device_id' and 'byte_size'"),
        ({"raw_handle": {"b64": "AAAA"}, "device_id": 0, "byte_size": True}, "numbers"),
    ],
)
def test_bodies_that_are_refused(server, body, text):
    url = f"http://{server.url('http')}/v2/cudasharedmemory/region/r/register"
    answer = urllib3.request("POST", url, body=orjson.dumps(body))
    assert answer.status == 400
    assert text in answer.json()["error"]


def test_a_region_stays_mapped_while_it_is_read():
    driver = FakeDriver()
    regions = Regions(True, CudaMemory(driver))
    regions.register_cuda("r", bytes([1]) * 64, 0, 16)
    region = regions._find("r", 0, 16)
    regions.unregister(Kind.CUDA)
    assert driver.mapped
    assert bytes(region.read(0, 4)) == bytes(4)
    del region
    gc.collect()
    assert not driver.mapped


def test_without_a_driver_or_the_option(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(C, "CDLL", missing)
    with pytest.raises(ServeError, match=r"needs the NVIDIA driver \(libcuda.so.1\)"):
        Regions(True).register_cuda("r", bytes(64), 0, 16)
    with pytest.raises(ServeError, match="--allow-client-shm"):
        Regions(False).register_cuda("r", bytes(64), 0, 16)
