"""`venturi llm`: generate, chat, explain and benchmark language models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from venturi.cli.output import console, emit_json, errors, table
from venturi.core.errors import ModelError, RequestError

if TYPE_CHECKING:
    from venturi.llm.api import LLM
    from venturi.llm.sampling_params import SamplingParams

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
bench_app = typer.Typer(no_args_is_help=True, help="Measure latency and throughput.")
app.add_typer(bench_app, name="bench")

Model = Annotated[str, typer.Argument(help="A Hugging Face model folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")]
Quant = Annotated[str | None, typer.Option(help="fp8: weights in e4m3.")]
KvDtype = Annotated[str, typer.Option(help="Of the KV cache: auto, fp32, fp16, bf16, fp8 or int8.")]
Dummy = Annotated[bool, typer.Option("--dummy", help="Random weights: needs only config.json.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Probability mass to draw from.")]
TopK = Annotated[int, typer.Option(help="Likeliest tokens to draw from; 0: all.")]
Seed = Annotated[int | None, typer.Option(help="For repeatable answers.")]
Isl = Annotated[int | None, typer.Option(help="Input tokens of a request (128), or their mean.")]
Osl = Annotated[int | None, typer.Option(help="Output tokens of a request (128), or their mean.")]
Lengths = Annotated[str, typer.Option(help="fixed, or sharegpt: drawn as conversations have them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command("run", epilog="Example: venturi llm run examples/llm/pydoc-5m --prompt 'Return the' --max-tokens 60")
def run(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")],
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    regex: Annotated[str | None, typer.Option(help="The answer must match.")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="File with a JSON schema the answer must match.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    kv_dtype: KvDtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue prompts; one prompt streams as it is generated."""
    params = _params(max_tokens, temperature, top_p, top_k, seed, stop or [], _guide(regex, json_schema))
    with _load(model, device, dtype, quant, kv_dtype, dummy=False, max_seq_len=None) as llm:
        if as_json:
            outputs = llm.generate(list(prompt), params)
            assert isinstance(outputs, list), "a list of prompts gives a list of outputs"
            emit_json([_as_dict(output) for output in outputs])
        elif len(prompt) == 1:
            _stream(llm, prompt[0], params, echo=prompt[0])
        else:
            outputs = llm.generate(list(prompt), params)
            assert isinstance(outputs, list), "a list of prompts gives a list of outputs"
            for output in outputs:
                console.rule()
                console.print((output.prompt or "") + output.outputs[0].text)


@app.command("chat", epilog="Example: venturi llm chat path/to/model --system 'Answer briefly.'")
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    kv_dtype: KvDtype = "auto",
) -> None:
    """Talk to a model that has a chat template. An empty line or Ctrl-D ends, Ctrl-C stops an answer."""
    params = _params(max_tokens, temperature, top_p, top_k, seed, [], None)
    messages = [{"role": "system", "content": system}] if system else []
    with _load(model, device, dtype, quant, kv_dtype, dummy=False, max_seq_len=None) as llm:
        while text := _ask():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _stream(llm, messages, params)})


@app.command("explain", epilog="Example: venturi llm explain examples/llm/pydoc-5m")
def explain(
    model: Model,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    kv_dtype: KvDtype = "auto",
    dummy: Dummy = False,
    max_seq_len: Annotated[int | None, typer.Option(help="Longest text; default: the model's context.")] = None,
) -> None:
    """Which code computes what on this device, and the memory plan."""
    with _load(model, device, dtype, quant, kv_dtype, dummy=dummy, max_seq_len=max_seq_len) as llm:
        console.print(llm.explain(), highlight=False)


@app.command("save", epilog="Example: venturi llm save path/to/model model-fp8 --quant fp8")
def save(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    dtype: Dtype = "auto",
    quant: Quant = None,
    dummy: Dummy = False,
    as_json: AsJson = False,
) -> None:
    """Write a folder that loads without converting again: weights joined and quantized, config, tokenizer."""
    from venturi.llm.loader import outline_model

    source = Path(model)
    if not source.is_dir():
        raise ModelError(f"no folder {model!r}; expected a Hugging Face model folder (nothing is downloaded)")
    with errors.status(f"saving {model}", spinner="dots") as status:
        outline = outline_model(source, dtype=dtype, quant=quant)
        size = outline.save(
            out, "dummy" if dummy else "auto", lambda done, total: status.update(f"loading shard {done}/{total}")
        )
    if as_json:
        emit_json({"folder": str(out), "bytes": size, "quant": outline.quant})
        return
    console.print(f"{out}: {size / 2**20:,.1f} MiB of weights", highlight=False)


@bench_app.command("throughput", epilog="Example: venturi llm bench throughput MODEL --requests 64 --lengths sharegpt")
def throughput(
    model: Model,
    isl: Isl = None,
    osl: Osl = None,
    lengths: Lengths = "fixed",
    requests: Annotated[int, typer.Option(help="Requests, all at once.")] = 100,
    shared_prefix: Annotated[int, typer.Option(help="Leading tokens that all prompts share.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    kv_dtype: KvDtype = "auto",
    dummy: Dummy = False,
    as_json: AsJson = False,
) -> None:
    """Random prompts, all at once: tokens per second, and latencies of requests."""
    from venturi.llm.workloads import measure, workload

    with _load(model, device, dtype, quant, kv_dtype, dummy=dummy, max_seq_len=None) as llm:
        _report(measure(llm, workload(lengths, isl, osl, requests, shared_prefix, llm.loaded.max_seq_len)), as_json)


@bench_app.command("latency", epilog="Example: venturi llm bench latency MODEL --batch 1 --isl 128 --osl 64")
def latency(
    model: Model,
    isl: Annotated[int, typer.Option(help="Input tokens of a request.")] = 128,
    osl: Annotated[int, typer.Option(help="Output tokens of a request.")] = 128,
    batch: Annotated[int, typer.Option(help="Requests side by side.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    kv_dtype: KvDtype = "auto",
    dummy: Dummy = False,
    as_json: AsJson = False,
) -> None:
    """A fixed batch of random prompts: time to the first token, and between tokens."""
    from venturi.llm.workloads import measure, workload

    with _load(model, device, dtype, quant, kv_dtype, dummy=dummy, max_seq_len=None) as llm:
        measure(llm, workload("fixed", isl, min(osl, 8), batch, 0, llm.loaded.max_seq_len))
        _report(measure(llm, workload("fixed", isl, osl, batch, 0, llm.loaded.max_seq_len)), as_json)


@bench_app.command("serve", epilog="Example: venturi llm bench serve MODEL --rate 4 --requests 40")
def serve(
    model: Model,
    rate: Annotated[float, typer.Option(help="Requests per second, Poisson arrivals.")] = 4.0,
    isl: Isl = None,
    osl: Osl = None,
    lengths: Lengths = "fixed",
    requests: Annotated[int, typer.Option(help="Requests.")] = 40,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    kv_dtype: KvDtype = "auto",
    dummy: Dummy = False,
    as_json: AsJson = False,
) -> None:
    """Requests arriving at random times, in process: latencies under load."""
    from venturi.llm.workloads import measure, workload

    with _load(model, device, dtype, quant, kv_dtype, dummy=dummy, max_seq_len=None) as llm:
        _report(measure(llm, workload(lengths, isl, osl, requests, 0, llm.loaded.max_seq_len), rate=rate), as_json)


def _load(
    model: str, device: str, dtype: str, quant: str | None, kv_dtype: str, *, dummy: bool, max_seq_len: int | None
) -> LLM:
    from venturi.llm.api import LLM
    from venturi.llm.config import KvCacheConfig

    with errors.status(f"loading {model}", spinner="dots") as status:
        return LLM(
            model, device=device, dtype=dtype, quant=quant, load_format="dummy" if dummy else "auto",
            max_seq_len=max_seq_len, kv_cache=KvCacheConfig.model_validate({"dtype": kv_dtype}),
            progress=lambda done, total: status.update(f"loading shard {done}/{total}"),
        )  # fmt: skip


def _params(
    max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None, stop: list[str], guide: Any
) -> SamplingParams:
    from venturi.llm.sampling_params import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop,
        guided_decoding=guide,
    )  # fmt: skip


def _guide(regex: str | None, schema: Path | None) -> Any:
    from venturi.llm.sampling_params import GuidedDecodingParams

    if regex is None and schema is None:
        return None
    if schema is None:
        return GuidedDecodingParams(regex=regex)
    try:
        return GuidedDecodingParams(json=json.loads(schema.read_text()), regex=regex)
    except (OSError, ValueError) as exc:
        raise RequestError(f"the JSON schema cannot be read: {exc}", where=str(schema)) from exc


def _stream(llm: LLM, prompt: Any, params: SamplingParams, echo: str = "") -> str:
    output = llm.generate_async(prompt, params)
    sys.stdout.write(echo)
    try:
        for now in output:
            sys.stdout.write(now.outputs[0].text_diff)
            sys.stdout.flush()
    except KeyboardInterrupt:
        output.abort()
    sys.stdout.write("\n")
    return output.outputs[0].text


def _ask() -> str:
    try:
        return console.input("> ").strip()
    except EOFError:
        return ""


def _as_dict(output: Any) -> dict[str, Any]:
    if output.error is not None:
        return {"prompt": output.prompt, "error": str(output.error)}
    one = output.outputs[0]
    return {
        "prompt": output.prompt, "text": one.text, "token_ids": one.token_ids, "finish_reason": one.finish_reason,
        "cached_tokens": output.num_cached_tokens,
    }  # fmt: skip


def _report(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(figures)
        return
    rows = [[k, v] for k, v in figures.items() if k != "ms" and v is not None]
    console.print(table("run", ["figure", "value"], rows))
    latencies = [[name, *values.values()] for name, values in figures["ms"].items()]
    console.print(table("latency, ms", ["", "p50", "p90", "p99"], latencies))
