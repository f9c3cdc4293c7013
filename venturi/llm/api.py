"""`LLM`: load a model folder, generate. The public face of venturi.llm.

>>> from venturi import LLM, SamplingParams                                     # doctest: +SKIP
>>> llm = LLM("path/to/model")                                                  # doctest: +SKIP
>>> llm.generate("Once upon", SamplingParams(max_tokens=20)).outputs[0].text    # doctest: +SKIP
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from venturi.core.errors import DeviceError, ModelError, RequestError
from venturi.llm.config import CudaGraphConfig, KvCacheConfig, SchedulerConfig
from venturi.llm.explain import explain
from venturi.llm.invariant import check_device, make_invariant
from venturi.llm.kv.cache import KvCache
from venturi.llm.kv.pool import CACHE_DTYPES, KvPool, check_dtype
from venturi.llm.loader import outline_model
from venturi.llm.loop import EngineLoop, EngineThread
from venturi.llm.memory import MemoryPlan, plan_memory, weight_bytes
from venturi.llm.outputs import RequestOutput, failed
from venturi.llm.prompts import is_one_prompt
from venturi.llm.request import Request
from venturi.llm.requests import RequestFactory
from venturi.llm.runner import TorchRunner
from venturi.llm.sampling_params import SamplingParams
from venturi.llm.saved import TUNED
from venturi.llm.scheduler.plan import StepRunner
from venturi.llm.scheduler.scheduler import Scheduler
from venturi.llm.tokenizer import TextTokenizer
from venturi.llm.weights import Progress


class LLM:
    """A language model that answers many requests at once.

    Args:
        model: a Hugging Face folder (config.json, *.safetensors, tokenizer.json), or one that `save` wrote.
        tokenizer: another folder's tokenizer; None: the model's. skip_tokenizer_init: prompts are token ids only.
        dtype: "auto" (the config's), "fp32", "fp16", "bf16". load_format: "auto", or "dummy" for random weights.
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1".
        kv_cache, scheduler, cuda_graph: see the classes. quant: None, or "fp8" (weights to e4m3 while loading).
        max_seq_len: longest text; None: the model's context.
        seed: of requests that have none. model_kwargs: fields of config.json to replace.
        progress: called with (shards loaded, shards).
        deterministic: the same request gives the same bits whatever else runs beside it (CPU only, slower).

    Raises:
        ModelError, DeviceError, RequestError: before anything is left allocated.
    """

    def __init__(
        self, model: str | Path, tokenizer: str | Path | TextTokenizer | None = None, *, dtype: str = "auto",
        load_format: Literal["auto", "dummy"] = "auto", device: str = "auto", kv_cache: KvCacheConfig | None = None,
        scheduler: SchedulerConfig | None = None, cuda_graph: CudaGraphConfig | None = None, quant: str | None = None,
        tensor_parallel_size: int = 1, max_seq_len: int | None = None, skip_tokenizer_init: bool = False, seed: int = 0,
        model_kwargs: dict[str, Any] | None = None, progress: Progress | None = None, deterministic: bool = False,
    ) -> None:  # fmt: skip
        if tensor_parallel_size != 1:
            raise RequestError(f"tensor_parallel_size={tensor_parallel_size}; this version runs on one device")
        folder = Path(model)
        if not folder.is_dir():
            raise ModelError(f"no folder {str(folder)!r}; expected a Hugging Face model folder (nothing is downloaded)")
        self.device = _resolve_device(device)
        self.deterministic = deterministic
        if deterministic:
            check_device(self.device)
        self.kv_config, self.scheduler_config = kv_cache or KvCacheConfig(), scheduler or SchedulerConfig()
        self.tokenizer = None if skip_tokenizer_init else _tokenizer(tokenizer, folder)
        self._outline = partial(
            outline_model, folder, dtype=dtype, max_seq_len=max_seq_len, overrides=model_kwargs, quant=quant
        )
        outline = self._outline()
        cache_dtype = CACHE_DTYPES.get(self.kv_config.dtype, outline.dtype)
        spec = outline.model.spec
        check_dtype(spec, cache_dtype)
        self.memory_plan: MemoryPlan = plan_memory(
            spec, weight_bytes(outline, self.device), outline.dtype, cache_dtype, self.kv_config,
            self.scheduler_config, outline.max_seq_len, self.device,
        )  # fmt: skip
        self._folder, self._load_format = folder, load_format
        self.loaded = outline.fill(self.device, load_format, progress)
        plan = self.memory_plan
        pool = KvPool(spec, plan.num_blocks, plan.block_tokens, cache_dtype, self.device, plan.host_blocks)
        self._cache = KvCache(
            plan.num_blocks, plan.block_tokens, reuse=self.kv_config.enable_block_reuse,
            partial_reuse=self.kv_config.enable_partial_reuse, host_blocks=plan.host_blocks,
        )  # fmt: skip
        self._scheduler = Scheduler(self.scheduler_config, self._cache)
        self.runner = self._make_runner(pool, cuda_graph or CudaGraphConfig())
        self._factory = RequestFactory(self.tokenizer, spec.vocab_size, outline.max_seq_len, self.loaded.end_ids, seed)
        overlap = self.device.type == "cuda" and self.scheduler_config.overlap
        self._thread = EngineThread(EngineLoop(self._scheduler, self.runner, overlap=overlap), self.runner.prepare)
        gc.collect()
        gc.freeze()  # what is loaded stays: collections between steps need not look at it

    # ---- generating

    def generate(
        self, prompts: Any, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> RequestOutput | list[RequestOutput]:
        """Generate and wait.

        Args:
            prompts: a prompt, or a list of them. A prompt is text, token ids, chat messages, or a record
                {"prompt" | "prompt_token_ids" | "messages": ...}.
            params: for all prompts, or one per prompt.

        Returns:
            The output, or the list of outputs in order. In a list, a request that failed has `.error`, and its
            `.outputs` raise it; the others are not affected.

        Raises:
            RequestError: for a single prompt that is refused.
        """
        if is_one_prompt(prompts):
            if params is not None and not isinstance(params, SamplingParams):
                raise RequestError("one prompt takes one SamplingParams")
            return self.generate_async(prompts, params).result()
        listed = list(prompts)
        each = [params] * len(listed) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts but {len(each)} SamplingParams; give one, or one per prompt")
        outputs = self._submit([(p, s or SamplingParams(), 0) for p, s in zip(listed, each)], streaming=False)
        for output in outputs:
            output.wait()
        return outputs

    def generate_async(
        self, prompt: Any, params: SamplingParams | None = None, *, streaming: bool = True, priority: int = 0
    ) -> RequestOutput:
        """Start generating; returns at once. The output is a future and an (async) iterator, and has `abort()`.

        Raises:
            RequestError: the request is refused.
        """
        output = self._submit([(prompt, params or SamplingParams(), priority)], streaming=streaming)[0]
        if output.done() and output.error is not None:
            raise output.error
        return output

    def _submit(self, work: list[tuple[Any, SamplingParams, int]], *, streaming: bool) -> list[RequestOutput]:
        outputs, accepted = [], []
        for prompt, params, priority in work:
            try:
                if not isinstance(params, SamplingParams):
                    raise RequestError(f"params must be SamplingParams, got {type(params).__name__}")
                request, text = self._factory.make(prompt, params, priority)
                self._scheduler.check_fits(request)
            except RequestError as exc:
                outputs.append(failed(Request([0], SamplingParams(), 1), exc, self._thread.abort))
                continue
            output = RequestOutput(request, self.tokenizer, text, self._thread.abort)
            request.listener, request.streaming = output, streaming
            outputs.append(output)
            accepted.append(request)
        self._thread.submit(accepted)
        return outputs

    # ---- looking inside

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the state of queues and cache now."""
        scheduler, cache = self._scheduler, self._cache
        return self._thread.loop.stats.as_dict() | {
            "requests_waiting": len(scheduler.waiting),
            "sequences_running": len(scheduler.running),
            "sequences_paused": len(scheduler.paused),
            "pauses": scheduler.num_pauses,
            "kv_blocks": cache.pool.num_blocks,
            "kv_blocks_free": cache.pool.num_free,
            "kv_blocks_cached": cache.num_cached,
        }

    def explain(self) -> str:
        """Which kernel computes what and why, and the memory plan, as text."""
        return explain(self)

    def save(self, folder: str | Path) -> None:
        """Write a model folder that loads without converting again: weights joined and quantized as they are used,
        config, tokenizer and, on CUDA, the kernels chosen so far. `LLM(folder)` reads it, on any device.

        The original is read and quantized again, in host memory. Raises RequestError unless `folder` is new or empty,
        ModelError when the original is gone or `folder` cannot be written.
        """
        self._outline().save(Path(folder), self._load_format, choices=getattr(self.runner, "choices", None))

    def check_integrity(self) -> None:
        """Raise InternalError unless every cache block is accounted for."""
        self._thread.call(self._scheduler.check_integrity)

    def clear_prefix_cache(self) -> None:
        """Forget cached prefixes that no running request uses."""
        self._thread.call(lambda: (self._cache.clear(), None)[1])

    def shutdown(self) -> None:
        """Cancel what runs, end the engine's thread, free cache and graphs. Safe to call again."""
        self._thread.stop()
        self.runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if "_thread" in self.__dict__:
            self._thread.stop()

    def _make_runner(self, pool: KvPool, graphs: CudaGraphConfig) -> StepRunner:
        model, slots, length = self.loaded.model, self.scheduler_config.max_batch_size, self.loaded.max_seq_len
        if self.device.type == "cpu":
            if self.deterministic:
                make_invariant(model, pool)
            return TorchRunner(model, pool, slots, length, invariant=self.deterministic)
        from venturi.llm.cuda_runner import CudaRunner

        tokens, shipped = self.scheduler_config.max_num_tokens, self._folder / TUNED
        return CudaRunner(model, pool, slots, length, graphs, tokens, shipped)


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise DeviceError(f"device={name!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from exc
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device={name!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device={name!r}, but torch finds no CUDA device here; use device='cpu'")
    return device


def _tokenizer(given: str | Path | TextTokenizer | None, folder: Path) -> TextTokenizer | None:
    if isinstance(given, TextTokenizer):
        return given
    if given is None and not (folder / "tokenizer.json").is_file():
        return None
    return TextTokenizer(folder if given is None else Path(given))
