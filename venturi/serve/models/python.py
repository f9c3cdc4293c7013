"""Triton's Python models: `model.py` in worker processes, one an instance, started again when they die."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from google.protobuf.json_format import ParseDict, ParseError
from tritonclient.grpc import model_config_pb2 as pb

from venturi.serve.config import ModelConfig, message_json
from venturi.serve.custom_metrics import CustomMetrics
from venturi.serve.errors import ServeError, Status, invalid
from venturi.serve.models.base import Answer
from venturi.serve.python.calls import Submit
from venturi.serve.python.process import Worker
from venturi.serve.request import InferRequest


class PythonKind:
    """`submit` is how a model's own requests to other models are made, `metrics` where its own metrics are."""

    name = "python"

    def __init__(self, submit: Submit, metrics: CustomMetrics) -> None:
        self._submit, self._metrics = submit, metrics

    def complete(self, config: ModelConfig, folder: Path | None, default_max_batch: int) -> None:
        if folder is None:
            return
        worker = Worker(config.name, _file(config, folder), self._submit, self._metrics)
        try:
            worker.ask({"op": "import", "file": str(worker.file)})
            done, _ = worker.ask({"op": "complete", "config": message_json(config)})
        finally:
            worker.stop()
        try:
            completed = ParseDict(done["config"], pb.ModelConfig())
        except ParseError as exc:
            raise invalid(
                f"auto_complete_config of model '{config.name}' says what is no configuration: {exc}"
            ) from exc
        config.CopyFrom(completed)

    def load(self, config: ModelConfig, folder: Path) -> PythonModel:
        return PythonModel(config, _file(config, folder), self._submit, self._metrics)


class PythonModel:
    """As many workers as instances; a batch takes one that is free."""

    runs_inline = False

    def __init__(self, config: ModelConfig, file: Path, submit: Submit, metrics: CustomMetrics) -> None:
        self._config, self._file, self._submit, self._metrics = config, file, submit, metrics
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        names = [f"{g.name}_{i}" for g in config.instance_group for i in range(g.count)]
        try:
            for name in names:
                self._free.put(self._start(name))
        except BaseException:
            self.close()
            raise

    def execute(self, requests: list[InferRequest]) -> Sequence[Answer]:
        worker = self._free.get()
        try:
            if worker.is_dead:
                worker.stop()
                worker = self._start(worker.name)
            return worker.execute(requests)
        finally:
            self._free.put(worker)

    def inspect(self) -> dict[str, Any]:
        return {"reason": "a Python model, in worker processes"}

    def close(self) -> None:
        while not self._free.empty():
            self._free.get().stop()

    def _start(self, name: str) -> Worker:
        worker = Worker(name, self._file, self._submit, self._metrics)
        args = {
            "model_config": _text(self._config), "model_name": self._config.name, "model_instance_name": name,
            "model_instance_kind": "CPU", "model_instance_device_id": "0",
            "model_repository": str(self._file.parent.parent), "model_version": self._file.parent.name,
        }  # fmt: skip
        try:
            worker.ask({"op": "import", "file": str(self._file)})
            worker.ask({"op": "initialize", "args": args})
        except ServeError:
            worker.stop()
            raise
        return worker


def _file(config: ModelConfig, folder: Path) -> Path:
    name = config.default_model_filename or "model.py"
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise invalid(f"default_model_filename {name!r} of model {config.name} leaves its version folder")
    if not path.is_file():
        raise ServeError(Status.NOT_FOUND, f"no model file in {folder}: expected {name}")
    return path


def _text(config: ModelConfig) -> str:
    return orjson.dumps(message_json(config)).decode()
