"""Venturi: compile trained models into tuned engines and run them.

>>> import venturi as vt                               # doctest: +SKIP
>>> engine = vt.build("model.onnx")                    # doctest: +SKIP
>>> y = engine(x)                                      # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from venturi.core.errors import (
    DeviceError,
    EngineError,
    InternalError,
    ModelError,
    RequestError,
    ShapeError,
    TuningError,
    VenturiError,
)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from venturi.api import build, load, tune
    from venturi.engine.config import BuildConfig, Profile
    from venturi.engine.engine import Engine
    from venturi.engine.plan import TensorSpec
    from venturi.frontends.network import Network
    from venturi.llm.api import LLM
    from venturi.llm.config import CudaGraphConfig, KvCacheConfig, SchedulerConfig
    from venturi.llm.sampling_params import GuidedDecodingParams, SamplingParams
    from venturi.runtime.batching import Batching

_LAZY = {
    "build": "venturi.api",
    "load": "venturi.api",
    "tune": "venturi.api",
    "Engine": "venturi.engine.engine",
    "BuildConfig": "venturi.engine.config",
    "Profile": "venturi.engine.config",
    "TensorSpec": "venturi.engine.plan",
    "Network": "venturi.frontends.network",
    "Batching": "venturi.runtime.batching",
    "LLM": "venturi.llm.api",
    "SamplingParams": "venturi.llm.sampling_params",
    "GuidedDecodingParams": "venturi.llm.sampling_params",
    "KvCacheConfig": "venturi.llm.config",
    "SchedulerConfig": "venturi.llm.config",
    "CudaGraphConfig": "venturi.llm.config",
}

__all__ = [
    "LLM",
    "Batching",
    "BuildConfig",
    "CudaGraphConfig",
    "DeviceError",
    "Engine",
    "EngineError",
    "GuidedDecodingParams",
    "InternalError",
    "KvCacheConfig",
    "ModelError",
    "Network",
    "Profile",
    "RequestError",
    "SamplingParams",
    "SchedulerConfig",
    "ShapeError",
    "TensorSpec",
    "TuningError",
    "VenturiError",
    "__version__",
    "build",
    "load",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Heavy parts (torch, onnx) are imported when first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'venturi' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
