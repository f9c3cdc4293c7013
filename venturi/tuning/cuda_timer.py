"""Times one call on the GPU: the median of replays of a graph that holds the call several times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from venturi.tuning.timer import Timing

_GRAPH_US = 400.0
_MAX_CALLS = 20


class CudaTimer:
    """Owns a side stream and a memory pool for the graphs it captures one at a time; `_anchor` keeps the pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            self._anchor.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._kept = torch.empty(1, device=device).fill_(0)
            self._anchor.capture_end()

    def time(self, fn: Callable[[], object], repeats: int, deadline: float, beat_us: float | None = None) -> Timing:
        """Microseconds a call. Calls that cannot be captured (they wait for the device) are timed one by one.

        Stops at `deadline` (time.perf_counter) and after one replay when that is three times slower than `beat_us`.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            fn()
            once = self._measure(fn)
            calls = max(2, min(_MAX_CALLS, int(_GRAPH_US / max(once, 1.0))))
            graph = self._capture(fn, calls)
            run: Callable[[], object] = fn if graph is None else graph.replay
            calls = 1 if graph is None else calls
            times: list[float] = []
            run()
            for _ in range(max(repeats, 1)):
                times.append(self._measure(run) / calls)
                hopeless = beat_us is not None and min(times) > 3 * beat_us
                if hopeless or time.perf_counter() > deadline:
                    break
            del graph
        return Timing(statistics.median(times), max(times) - min(times))

    def _measure(self, fn: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self._stream)
        fn()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def _capture(self, fn: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        self._stream.synchronize()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            for _ in range(calls):
                fn()
        except RuntimeError:
            try:
                graph.capture_end()
            except RuntimeError:
                torch.cuda.synchronize(self._device)
            return None
        graph.capture_end()
        return graph
