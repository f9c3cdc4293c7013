"""Another process's device memory, by the real driver."""

from __future__ import annotations

import base64
import subprocess
import sys

import pytest

pytest.importorskip("ml_dtypes", reason="the server's tensors need ml_dtypes, which the extra 'serve' installs")

from venturi.serve.errors import ServeError
from venturi.serve.shared_memory import Kind, Regions

pytestmark = pytest.mark.gpu

# Allocates, shows its handle, and after a line on stdin says what is there now.
OWNER = """
import base64, ctypes as C, sys
cuda = C.CDLL("libcuda.so.1")
def call(name, *args):
    code = getattr(cuda, name)(*args)
    assert code == 0, (name, code)
class Handle(C.Structure):
    _fields_ = [("reserved", C.c_char * 64)]
call("cuInit", 0)
device, context, address, handle = C.c_int(), C.c_void_p(), C.c_uint64(), Handle()
call("cuDeviceGet", C.byref(device), 0)
call("cuDevicePrimaryCtxRetain", C.byref(context), device)
call("cuCtxSetCurrent", context)
size = 1 << 22
call("cuMemAlloc_v2", C.byref(address), C.c_size_t(size))
call("cuMemcpyHtoD_v2", address, bytes(range(256)) * (size // 256), C.c_size_t(size))
call("cuIpcGetMemHandle", C.byref(handle), address)
print(base64.b64encode(bytes(handle)).decode(), flush=True)
sys.stdin.readline()
found = (C.c_char * size)()
call("cuMemcpyDtoH_v2", found, address, C.c_size_t(size))
print(bytes(found[1000:1016]).hex(), flush=True)
"""


def test_another_process_sees_what_is_written():
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        handle = base64.b64decode(owner.stdout.readline())
        regions = Regions(True)
        with pytest.raises(ServeError, match="byte_size is"):
            regions.register_cuda("r", handle, 0, 1 << 30)
        with pytest.raises(ServeError, match="device_id 99"):
            regions.register_cuda("r", handle, 99, 16)
        with pytest.raises(ServeError, match="failed to register"):
            regions.register_cuda("r", bytes(64), 0, 16)
        regions.register_cuda("r", handle, 0, 1 << 22)
        assert bytes(regions.read("r", 250, 12)) == bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3, 4, 5])
        regions.write("r", 1000, memoryview(bytes(range(16))))
        assert bytes(regions.read("r", 1000, 16)) == bytes(range(16))
        regions.unregister(Kind.CUDA)
        regions.register_cuda("again", handle, 0, 1 << 22)
        answer, _ = owner.communicate("\n", timeout=60)
        assert answer.strip() == bytes(range(16)).hex()
    finally:
        owner.kill()
