"""Load for `venturi llm bench`: random prompts of given lengths, what they took, and what reading memory takes.

TTFT runs from sending to the first token; TPOT = (E2E - TTFT) / (tokens - 1) of a request; ITL are the gaps between
tokens. The prefix cache is emptied first.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from venturi.core.errors import RequestError
from venturi.engine.peaks import measure_bandwidth
from venturi.llm.models.spec import MoeSpec
from venturi.llm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from venturi.llm.api import LLM
    from venturi.llm.outputs import RequestOutput

Lengths = Literal["fixed", "sharegpt"]
LENGTHS = ("fixed", "sharegpt")
# Mean tokens of ShareGPT's prompts and answers as the vLLM paper (Kwon et al., SOSP 2023, figure 11) gives them; the
# widths of the log-normal distributions are ours.
SHAREGPT_MEANS, SHAREGPT_WIDTHS = (161.31, 337.99), (1.2, 0.9)
_LEAST = 4


@dataclass(frozen=True)
class Ask:
    """One request: its prompt's tokens without the shared ones, and how many tokens it wants."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Workload:
    """Requests in the order they are sent; all prompts begin with the same `shared` tokens."""

    asks: list[Ask]
    shared: int = 0


def workload(
    lengths: str, isl: int | None, osl: int | None, requests: int, shared: int, max_seq_len: int, seed: int = 0
) -> Workload:
    """`requests` of `isl` input and `osl` output tokens each ("fixed", 128 by default), or with lengths drawn around
    these means as ShareGPT's conversations have them ("sharegpt", its own means by default), cut to the context.

    Raises RequestError for lengths that the context has no room for.
    """
    if lengths not in LENGTHS:
        raise RequestError(f"lengths={lengths!r}; expected one of {', '.join(LENGTHS)}")
    if requests < 1 or any(n is not None and n < 1 for n in (isl, osl)) or shared < 0:
        raise RequestError(f"{requests} requests of {isl} and {osl} tokens, {shared} shared; expected positive numbers")
    if lengths == "sharegpt":
        means = (isl or SHAREGPT_MEANS[0], osl or SHAREGPT_MEANS[1])
        return Workload(_conversations(means, requests, max_seq_len - shared, seed), shared)
    prompt, output = isl or 128, osl or 128
    if prompt + output > max_seq_len:
        raise RequestError(f"{prompt} input and {output} output tokens exceed the context of {max_seq_len}")
    shared = min(shared, prompt)
    return Workload([Ask(prompt - shared, output)] * requests, shared)


def _conversations(means: tuple[float, float], requests: int, room: int, seed: int) -> list[Ask]:
    """Log-normal lengths. Those that do not fit are cut: the prompt to half of the room, the answer to what is left."""
    if room < 2 * _LEAST:
        raise RequestError(f"a context of {room} tokens has no room for conversations")
    rng = random.Random(seed)

    def draw(mean: float, width: float, most: int) -> int:
        return min(max(_LEAST, round(rng.lognormvariate(math.log(mean) - width * width / 2, width))), most)

    asks = []
    for _ in range(requests):
        prompt = draw(means[0], SHAREGPT_WIDTHS[0], room // 2)
        asks.append(Ask(prompt, draw(means[1], SHAREGPT_WIDTHS[1], room - prompt)))
    return asks


def measure(llm: LLM, load: Workload, rate: float | None = None, seed: int = 0) -> dict[str, Any]:
    """Send everything at once, or with Poisson arrivals of `rate` requests a second, and wait for the last answer."""
    rng, vocab = random.Random(seed), llm.loaded.model.spec.vocab_size
    prefix = [rng.randrange(vocab) for _ in range(load.shared)]
    prompts = [prefix + [rng.randrange(vocab) for _ in range(a.prompt)] for a in load.asks]
    llm.clear_prefix_cache()
    before, start, sent = llm.stats()["steps"], time.monotonic(), list[float]()
    outputs: list[RequestOutput] = []
    for prompt, ask in zip(prompts, load.asks):
        if rate is not None and outputs:
            time.sleep(rng.expovariate(rate))
        sent.append(time.monotonic())
        params = SamplingParams(temperature=0, max_tokens=ask.output, ignore_eos=True)
        outputs.append(llm.generate_async(prompt, params))
    for output in outputs:
        output.result()
    wall, steps = time.monotonic() - start, llm.stats()["steps"] - before
    return _figures(llm, prompts, outputs, sent, wall) | {"roofline_percent": _roofline(llm, load, steps, wall)}


def _figures(
    llm: LLM, prompts: list[list[int]], outputs: list[RequestOutput], sent: list[float], wall: float
) -> dict[str, Any]:
    first = [o.token_times[0] - s for o, s in zip(outputs, sent)]
    whole = [o.token_times[-1] - s for o, s in zip(outputs, sent)]
    gaps = [b - a for o in outputs for a, b in zip(o.token_times, o.token_times[1:])]
    made = [len(o.token_times) for o in outputs]
    per_token = [(e - f) / (n - 1) for e, f, n in zip(whole, first, made) if n > 1]
    read, written = sum(map(len, prompts)), sum(made)
    return {
        "requests": len(outputs), "input_tokens": read, "output_tokens": written, "wall_s": wall,
        "requests_per_s": len(outputs) / wall, "output_tokens_per_s": written / wall,
        "total_tokens_per_s": (read + written) / wall,
        "tokens_per_s_per_user": 1 / _quantile(per_token, 0.5) if per_token else None,
        "cached_prompt_tokens": sum(o.num_cached_tokens for o in outputs),
        "ms": {
            name: {f"p{int(100 * q)}": 1e3 * _quantile(values, q) for q in (0.5, 0.9, 0.99)}
            for name, values in (("ttft", first), ("tpot", per_token or [0.0]), ("itl", gaps or [0.0]), ("e2e", whole))
        },
    }  # fmt: skip


def _roofline(llm: LLM, load: Workload, steps: int, wall: float) -> float | None:
    """Percent of the time that went by that memory needs: every step reads the weights, every output token the cache
    of its context, at the bandwidth measured now. None for mixtures of experts, whose steps read some of the weights.
    """
    spec, plan = llm.loaded.model.spec, llm.memory_plan
    if any(isinstance(layer.mlp, MoeSpec) for layer in spec.layers):
        return None
    embedding = 0 if spec.tied else spec.vocab_size * spec.hidden * llm.loaded.dtype.itemsize
    context = sum(a.output * (load.shared + a.prompt + a.output / 2) for a in load.asks)
    moved = steps * (plan.weights - embedding) + context * plan.cache / plan.cache_tokens
    return 100 * moved / measure_bandwidth(llm.device) / wall


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
