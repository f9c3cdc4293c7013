"""Runs a server of its own, loads the model in one variant after the other, and measures each."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from venturi.core.errors import RequestError
from venturi.serve.analyze.search import Result, Variant, is_enough, variants
from venturi.serve.perf.load import Rules, at_concurrency
from venturi.serve.perf.target import HttpTarget, make_inputs


@dataclass(frozen=True)
class Space:
    """What is tried. Concurrency doubles from 1 up to `max_concurrency`."""

    instances: Sequence[int] = (1, 2)
    batches: Sequence[int] = (1, 2, 4, 8)
    delays_us: Sequence[int] = (0,)
    max_concurrency: int = 16
    budget_us: float | None = None


class Session:
    """Use as `async with`; the server ends with it."""

    def __init__(self, repository: Path, model: str) -> None:
        self._repository, self._model = repository, model
        self._process: subprocess.Popen[str] | None = None
        self._address = ""

    async def __aenter__(self) -> Session:
        command = [
            sys.executable, "-m", "venturi", "serve", str(self._repository), "--host", "127.0.0.1", "--http-port", "0",
            "--no-allow-grpc", "--no-allow-metrics", "--model-control-mode", "explicit", "--load-model", self._model,
            "--no-log-info", "--json",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        text = await asyncio.to_thread(self._read_addresses)
        self._address = f"127.0.0.1:{json.loads(text)['ports']['http']}"
        return self

    async def __aexit__(self, *failure: object) -> None:
        assert self._process is not None
        self._process.terminate()
        await asyncio.to_thread(self._process.wait)

    async def run(
        self, space: Space, rules: Rules, shapes: dict[str, tuple[int, ...]], report: Callable[[Result], None]
    ) -> tuple[list[Result], dict[str, Any]]:
        """All results, and the configuration as it was. `report` hears of each result."""
        config = await self._config()
        results: list[Result] = []
        for variant in variants(space.instances, space.batches, space.delays_us, int(config.get("max_batch_size", 0))):
            await self._load(variant.apply(config))
            levels: list[Result] = []
            concurrency = 1
            while concurrency <= space.max_concurrency and not is_enough(levels, space.budget_us):
                levels.append(await self._measure(variant, concurrency, rules, shapes))
                report(levels[-1])
                concurrency *= 2
            results += levels
        return results, config

    async def _measure(
        self, variant: Variant, concurrency: int, rules: Rules, shapes: dict[str, tuple[int, ...]]
    ) -> Result:
        target = HttpTarget(self._address, self._model)
        try:
            ports, max_batch = await target.describe()
            target.prepare(make_inputs(ports, 1, max_batch > 0, shapes))
            found = await at_concurrency(target, concurrency, 1, rules)
        finally:
            await target.close()
        latency = found.mean_us if rules.percentile is None else found.percentiles_us[rules.percentile]
        rows = found.server.get("server_batch", 1.0)
        return Result(variant, concurrency, found.infer_per_s, latency, found.mean_us, rows)

    async def _config(self) -> dict[str, Any]:
        target = HttpTarget(self._address, self._model)
        try:
            return dict(await target.get(f"/v2/models/{self._model}/config"))
        finally:
            await target.close()

    async def _load(self, config: dict[str, Any]) -> None:
        target = HttpTarget(self._address, self._model)
        body = {"parameters": {"config": json.dumps(config)}}
        try:
            await target.post(f"/v2/repository/models/{self._model}/load", body)
        finally:
            await target.close()

    def _read_addresses(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            line = self._process.stdout.readline()
            if not line:
                raise RequestError(f"the server for {self._repository} did not start; its messages are above")
            text += line
        return text
