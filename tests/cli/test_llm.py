"""`venturi llm` on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from venturi.cli.main import app
from venturi.core.errors import ModelError, RequestError

DEMO = str(Path(__file__).parents[2] / "examples" / "llm" / "pydoc-5m")
run = CliRunner().invoke


def test_run_streams_the_prompt_and_its_continuation() -> None:
    done = run(
        app,
        ["llm", "run", DEMO, "--prompt", "Return the", "--max-tokens", "12", "--temperature", "0", "--device", "cpu"],
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Return the")
    assert len(done.stdout) > 20


def test_run_json_of_several_prompts(tmp_path: Path) -> None:
    schema = tmp_path / "s.json"
    schema.write_text('{"enum": [1, 2]}')
    arguments = ["--prompt", "a", "--prompt", "b", "--json", "--json-schema", str(schema), "--device", "cpu"]
    done = run(app, ["llm", "run", DEMO, *arguments])
    assert done.exit_code == 0, done.output
    answers = json.loads(done.stdout)
    assert [a["prompt"] for a in answers] == ["a", "b"]
    assert all(json.loads(a["text"]) in (1, 2) for a in answers)


@pytest.mark.parametrize(
    "arguments",
    [
        ["throughput", DEMO, "--isl", "20", "--osl", "6", "--requests", "5", "--shared-prefix", "10"],
        ["latency", DEMO, "--isl", "20", "--osl", "6"],
        ["serve", DEMO, "--isl", "20", "--osl", "4", "--requests", "4", "--rate", "50"],
        ["throughput", DEMO, "--lengths", "sharegpt", "--isl", "20", "--osl", "6", "--requests", "5"],
    ],
)
def test_bench(arguments: list[str]) -> None:
    done = run(app, ["llm", "bench", *arguments, "--json", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["output_tokens_per_s"] > 0
    assert figures["ms"]["ttft"]["p50"] <= figures["ms"]["e2e"]["p99"]
    assert 0 < figures["roofline_percent"] < 100


def test_explain_shows_the_memory_plan() -> None:
    done = run(app, ["llm", "explain", DEMO, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "KV cache" in done.stdout
    assert "LlamaForCausalLM" in done.stdout


def test_every_command_shows_an_example() -> None:
    for command in (
        ["run"],
        ["chat"],
        ["explain"],
        ["save"],
        ["bench", "throughput"],
        ["bench", "latency"],
        ["bench", "serve"],
    ):
        done = run(app, ["llm", *command, "--help"])
        assert "Example:" in done.output


def test_errors_are_venturi_errors() -> None:
    done = run(app, ["llm", "run", "/nonexistent", "--prompt", "x"])
    assert isinstance(done.exception, ModelError)
    done = run(app, ["llm", "run", DEMO, "--prompt", "x", "--temperature", "-1", "--device", "cpu"])
    assert isinstance(done.exception, RequestError)
