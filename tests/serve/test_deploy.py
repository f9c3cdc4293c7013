"""The files in deploy/ agree with the server: flags, ports, paths, metric names, each other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from tests.serve.chart import rendered
from tests.serve.running import add_engine, scaled, serving
from venturi.cli.main import app

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def options() -> set[str]:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {name for parameter in serve.params for name in (*parameter.opts, *parameter.secondary_opts)}


def check_arguments(arguments: list[str]) -> None:
    assert arguments[0] == "/models"
    assert [a for a in arguments if a.startswith("--") and a.split("=")[0] not in options()] == []


def test_the_image_runs_the_command() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1]) == ["venturi", "serve"]  # type: ignore[index]
    check_arguments(json.loads(re.findall(r"^CMD (.*)$", text, re.MULTILINE)[-1]))
    assert "EXPOSE 8000 8001 8002" in text
    assert "USER 10001" in text
    extras = set(re.search(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)[1].split(","))  # type: ignore[index]
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras | {"cuda"})
    stages = [shlex.split(line) for line in text.splitlines() if line.startswith("FROM")]
    assert stages[0][-1] == "build"


def test_compose_agrees_with_the_image_and_its_own_files() -> None:
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    services = compose["services"]
    check_arguments(services["venturi"]["command"])
    assert (
        DEPLOY / "compose" / services["venturi"]["build"]["context"] / services["venturi"]["build"]["dockerfile"]
    ).is_file()
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / "compose" / source).is_file(), source
    prometheus = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert (job["metrics_path"], job["static_configs"][0]["targets"]) == ("/metrics", ["venturi:8002"])
    grace = int(services["venturi"]["stop_grace_period"].removesuffix("s"))
    assert grace > int(services["venturi"]["command"][-1])


def test_dashboards_and_scaling_ask_for_metrics_that_exist(tmp_path: Path) -> None:
    import urllib.request

    add_engine(tmp_path, "m", scaled(2.0))
    with (
        serving(tmp_path) as server,
        urllib.request.urlopen(f"http://{server.url('metrics')}/metrics") as reply,
    ):
        served = set(re.findall(r"^([a-z_]+)[{ ]", reply.read().decode(), re.MULTILINE))
    dashboard = json.loads((DEPLOY / "compose" / "grafana" / "dashboard.json").read_text())
    asked = {
        m for p in dashboard["panels"] for t in p["targets"] for m in re.findall(r"\b(?:nv|venturi)_\w+", t["expr"])
    }
    asked |= {m["pods"]["metric"]["name"] for m in rendered()["HorizontalPodAutoscaler"]["spec"]["metrics"]}
    assert asked <= served, asked - served
    source = yaml.safe_load((DEPLOY / "compose" / "grafana" / "datasource.yaml").read_text())["datasources"][0]
    assert {p["datasource"]["uid"] for p in dashboard["panels"]} == {source["uid"]}


@pytest.mark.parametrize(
    "path", sorted(p for p in DEPLOY.rglob("*.yaml") if p.parent.name != "templates"), ids=lambda p: p.name
)
def test_yaml_is_yaml(path: Path) -> None:
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(path.read_text()))
