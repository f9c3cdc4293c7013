"""Host cost of a decode step: scheduling, input building and collecting, with a model that does nothing.

python -m benchmarks.llm.host
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from venturi.llm.config import SchedulerConfig
from venturi.llm.kv.cache import KvCache
from venturi.llm.loop import EngineLoop
from venturi.llm.request import Request
from venturi.llm.sampling_params import SamplingParams
from venturi.llm.scheduler.plan import StepPlan, StepResult
from venturi.llm.scheduler.scheduler import Scheduler
from venturi.llm.step_inputs import InputBuilder


class NothingRunner:
    """Builds the inputs of every step and answers token 7."""

    def __init__(self, slots: int) -> None:
        self._builder = InputBuilder(slots, 64, 32)
        self._builder.track_changes()

    def launch(self, plan: StepPlan) -> NothingRunner:
        self._builder.build(plan)
        self._builder.take_changes()
        self._count = len(plan.draw_seqs)
        return self

    def result(self) -> StepResult:
        return StepResult([7] * self._count)

    def prepare(self) -> None: ...

    def close(self) -> None: ...


def measure(running: int) -> dict[str, float]:
    cache = KvCache(running * 64, 32)
    loop = EngineLoop(
        Scheduler(SchedulerConfig(max_batch_size=running, max_num_tokens=1 << 20), cache),
        NothingRunner(running),
        overlap=True,
    )
    for i in range(running):
        loop.add(Request([i % 50 + 1] * 100 + [i], SamplingParams(max_tokens=1500, temperature=0), 1500))
    for _ in range(20):
        loop.step()
    times = []
    for _ in range(300):
        start = time.perf_counter()
        loop.step()
        times.append(1e3 * (time.perf_counter() - start))
    return {"running": running, "median_ms": float(np.median(times)), "p99_ms": float(np.percentile(times, 99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", default="1,256,1024")
    for running in map(int, parser.parse_args().running.split(",")):
        print(json.dumps(measure(running)), flush=True)


if __name__ == "__main__":
    main()
