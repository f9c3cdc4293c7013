"""The Helm chart: it renders, Kubernetes would take what comes out, and it agrees with the server."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest

from tests.serve.chart import CHART, helm, rendered
from tests.serve.test_deploy import check_arguments
from venturi.serve.http.routes import find_route

BASE = {"Deployment", "Service", "ServiceAccount", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
EVERYTHING = {
    "gpus": 1, "tls.secret": "t", "apiKeys.secret": "k", "ingress.enabled": True, "ingress.tlsSecret": "i",
    "ingress.className": "nginx", "cache.claim": "c", "args": ["--load-on-demand"], "models.readOnly": False,
    "env": [{"name": "VENTURI_DEBUG", "value": "1"}], "nodeSelector": {"gpu": "h200"}, "serviceMonitor.enabled": True,
    "tolerations": [{"key": "gpu", "operator": "Exists"}], "imagePullSecrets": [{"name": "registry"}],
    "service.annotations": {"a": "b"}, "ingress.annotations": {"a": "b"},
}  # fmt: skip
LEAST = {
    "autoscaling.enabled": False, "disruptionBudget.enabled": False, "serviceAccount.create": False, "drainSeconds": 0,
    "models.volume": {"hostPath": {"path": "/srv/models"}},
}  # fmt: skip


def container_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container  # type: ignore[no-any-return]


@pytest.mark.parametrize(("values", "kinds"), [
    ({}, BASE), (EVERYTHING, BASE | {"Ingress", "ServiceMonitor"}), (LEAST, {"Deployment", "Service"}),
], ids=["defaults", "everything", "least"])  # fmt: skip
def test_what_it_renders_is_valid_and_fits_together(values: dict[str, Any], kinds: set[str]) -> None:
    found = rendered(values)
    assert set(found) == kinds
    for kind, thing in found.items():
        if kind != "ServiceMonitor":  # an object of prometheus-operator, not of Kubernetes
            kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)
    template = found["Deployment"]["spec"]["template"]
    container, pod = container_of(found), template["spec"]
    check_arguments(container["args"])
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        find_route("GET", tuple(get["path"].strip("/").split("/")))
        assert get["port"] in ports
        assert get["scheme"] == ("HTTPS" if "tls.secret" in values else "HTTP")
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    labels = template["metadata"]["labels"]
    selectors = [found["Deployment"]["spec"]["selector"]["matchLabels"], found["Service"]["spec"]["selector"]]
    for kind in ("PodDisruptionBudget", "ServiceMonitor"):
        if kind in found:
            selectors.append(found[kind]["spec"]["selector"]["matchLabels"])
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    assert all(p["targetPort"] in ports for p in found["Service"]["spec"]["ports"])
    exit_timeout = int(container["args"][-1].removeprefix("--exit-timeout-secs="))
    assert pod["terminationGracePeriodSeconds"] > exit_timeout + values.get("drainSeconds", 5)
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
    if "HorizontalPodAutoscaler" in found:
        target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])
        assert "replicas" not in found["Deployment"]["spec"]


def test_settings_arrive() -> None:
    found = rendered(EVERYTHING)
    container = container_of(found)
    assert container["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/gpu": 1}
    assert "--load-on-demand" in container["args"]
    assert {"--tls-cert=/tls/tls.crt", "--api-key-file=/keys/keys"} <= set(container["args"])
    (rule,) = found["Ingress"]["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == found["Service"]["metadata"]["name"]
    assert rendered({"gpus": 0})["Deployment"] == rendered()["Deployment"]
    assert rendered({"autoscaling.enabled": False, "replicas": 5})["Deployment"]["spec"]["replicas"] == 5


@pytest.mark.parametrize(("setting", "told"), [
    ("replica=3", "replica"), ("gpus=-1", "gpus"), ("service.type=Loud", "type"), ("service.httpPort=0", "httpPort"),
])  # fmt: skip
def test_wrong_values_are_named(setting: str, told: str) -> None:
    done = helm("template", "blue", str(CHART), "--set", setting)
    assert done.returncode != 0
    assert told in done.stderr


def test_lint() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout
