"""Folders that `LLM.save` and `venturi llm save` write: the same answers, strict reading, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.llm.tiny import make
from venturi import LLM, KvCacheConfig, ModelError, RequestError, SamplingParams
from venturi.cli.main import app
from venturi.llm.linear_tuner import read_choices
from venturi.llm.loader import outline_model
from venturi.llm.saved import MARK, TUNED, Saved, load_saved, read_mark, write_folder

GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
PROMPTS = [[5, 9, 30, 7], [11] * 20]
CACHE = KvCacheConfig(max_tokens=512)


def answers(folder, **options):
    with LLM(folder, device="cpu", kv_cache=CACHE, skip_tokenizer_init=True, **options) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    return [
        ([o.outputs[0].token_ids], [next(iter(r.values())).logprob for r in o.outputs[0].logprobs]) for o in outputs
    ]


def tensors(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt2", "qwen2", "mixtral", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_saved_model_answers_as_the_original(tmp_path, name, dtype):
    """Tied heads, biases, joined projections, experts and routers' corrections included."""
    make(name, tmp_path / "original")
    with LLM(tmp_path / "original", device="cpu", dtype=dtype, kv_cache=CACHE, skip_tokenizer_init=True) as llm:
        llm.save(tmp_path / "saved")
    assert read_mark(tmp_path / "saved") == Saved(dtype, None)
    assert answers(tmp_path / "saved") == answers(tmp_path / "original", dtype=dtype)


def test_quantized_weights_are_kept_and_not_made_again(tmp_path):
    make("llama2", tmp_path / "original")
    outline_model(tmp_path / "original", quant="fp8", dtype="bf16").save(tmp_path / "saved")
    kept = tensors(tmp_path / "saved")
    assert kept["layers.0.self_attn.qkv_proj.weight"].dtype == torch.float8_e4m3fn
    assert kept["layers.0.self_attn.qkv_proj.scales"].dtype == torch.float32
    assert kept["embed_tokens.weight"].dtype == torch.bfloat16
    want = answers(tmp_path / "original", quant="fp8", dtype="bf16")
    assert answers(tmp_path / "saved") == answers(tmp_path / "saved", quant="fp8") == want
    outline_model(tmp_path / "saved").save(tmp_path / "again")
    assert {k: v.view(torch.uint8).tolist() for k, v in tensors(tmp_path / "again").items()} == {
        k: v.view(torch.uint8).tolist() for k, v in kept.items()
    }
    with pytest.raises(RequestError, match="saved in bf16"):
        LLM(tmp_path / "saved", device="cpu", dtype="fp32")


def test_dummy_weights_and_overrides_are_saved(tmp_path):
    make("llama2", tmp_path / "original")
    options = {"model_kwargs": {"num_hidden_layers": 2}, "load_format": "dummy", "dtype": "fp32"}
    with LLM(tmp_path / "original", device="cpu", kv_cache=CACHE, skip_tokenizer_init=True, **options) as llm:
        llm.save(tmp_path / "saved")
    assert answers(tmp_path / "saved") == answers(tmp_path / "original", **options)


def test_large_models_are_written_in_shards(tmp_path):
    make("llama2", tmp_path / "original")
    outline = outline_model(tmp_path / "original", dtype="fp32")
    outline._fill_weights(torch.device("cpu"), "auto", None)
    size = write_folder(
        outline.model, Saved("fp32", None), outline.config.fields, outline.folder, tmp_path / "saved", None, 50_000
    )
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == size
    assert answers(tmp_path / "saved") == answers(tmp_path / "original", dtype="fp32")
    files[1].unlink()
    with pytest.raises(ModelError, match=f"missing shards: {files[1].name}"):
        LLM(tmp_path / "saved", device="cpu")


def test_nothing_is_overwritten_or_left_half_written(tmp_path, monkeypatch):
    make("llama2", tmp_path / "original")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(RequestError, match="not an empty folder"):
        outline_model(tmp_path / "original").save(tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]
    monkeypatch.setattr("venturi.llm.saved.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ModelError, match="disk full"):
        outline_model(tmp_path / "original").save(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "original"]


@pytest.mark.parametrize(
    "text, message",
    [("{", "cannot be read"), ("[]", "cannot be read"), ('{"dtype": "bf16"}', "cannot be read"),
     ('{"dtype": "bf16", "quant": null, "format": 9}', "format 9"), ('{"dtype": "int3", "quant": null}', "int3")],
)  # fmt: skip
def test_a_bad_mark_is_refused(tmp_path, text, message):
    make("llama2", tmp_path)
    (tmp_path / MARK).write_text(text)
    with pytest.raises(ModelError, match=message):
        LLM(tmp_path, device="cpu")


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    make("llama2", tmp_path / "original")
    outline_model(tmp_path / "original", dtype="fp32").save(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.safetensors")
    kept = load_file(path)

    def refused(change):
        changed = dict(kept)
        change(changed)
        save_file(changed, path)
        outline = outline_model(tmp_path / "saved")
        with pytest.raises(ModelError) as caught:
            load_saved(outline.model, outline.saved, outline.dtype, outline.folder, torch.device("cpu"))
        return str(caught.value)

    def swap(t):
        t["extra"] = t.pop("norm.weight")

    assert "1 missing: norm.weight; 1 unknown: extra" in refused(swap)
    wrong = refused(lambda t: t.update({"norm.weight": torch.ones(3)}))
    assert "'norm.weight' is float32[3], expected float32[48]" in wrong
    assert "is float16[48]" in refused(lambda t: t.update({"norm.weight": torch.ones(48).half()}))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="shard cannot be read"):
        LLM(tmp_path / "saved", device="cpu")


def test_choices_of_kernels_travel_and_the_users_own_go_first(tmp_path):
    make("llama2", tmp_path / "original")
    choices = tmp_path / "linear-abc.json"
    choices.write_text(
        json.dumps(
            {"a": "torch", "b": {"small": {"block_n": 64, "block_k": 128, "stages": 6, "warps": 4, "splits": 1}}}
        )
    )
    outline_model(tmp_path / "original").save(tmp_path / "saved", choices=choices)
    shipped = tmp_path / "saved" / TUNED / choices.name
    own = tmp_path / "own.json"
    assert read_choices(shipped, own) == read_choices(choices)
    own.write_text(json.dumps({"b": "torch"}))
    assert read_choices(shipped, own) == {"a": "torch", "b": "torch"}
    own.write_text("{")
    assert read_choices(shipped, own) == read_choices(choices)


def test_the_command(tmp_path):
    make("llama2", tmp_path / "original")
    shutil.copy(Path(__file__).parents[2] / "examples/llm/pydoc-5m/tokenizer.json", tmp_path / "original")
    run = CliRunner().invoke(
        app, ["llm", "save", str(tmp_path / "original"), str(tmp_path / "saved"), "--quant", "fp8", "--json"]
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["quant"] == "fp8"
    assert found["bytes"] == sum(t.numel() * t.itemsize for t in tensors(tmp_path / "saved").values())
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    again = CliRunner().invoke(app, ["llm", "save", str(tmp_path / "nowhere"), str(tmp_path / "x")])
    assert again.exit_code != 0
