"""Ensembles: models made of other models. What they compute is a plan for the ensemble scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from venturi.core.errors import InternalError
from venturi.serve.config import ModelConfig, datatype
from venturi.serve.errors import ServeError, invalid
from venturi.serve.models.base import Answer
from venturi.serve.request import InferRequest
from venturi.serve.schedulers.ensemble import Plan, Step, Submit
from venturi.serve.served import ServedVersion
from venturi.serve.validation import Port, Signature

Find = Callable[[str, str], ServedVersion]


@dataclass
class EnsembleModel:
    """Holds the plan; requests go to an EnsembleDriver and never here."""

    plan: Plan
    submit: Submit
    find: Find
    runs_inline: bool = True

    @property
    def stamp(self) -> str:
        """Of what the steps compute now."""
        return "".join(self.find(s.model, s.version).stamp for s in self.plan.steps)

    def execute(self, requests: list[InferRequest]) -> list[Answer]:
        raise InternalError(f"ensemble {self.plan.name} is executed by its scheduler")

    def inspect(self) -> dict[str, Any]:
        return {"reason": "an ensemble of " + ", ".join(step.model for step in self.plan.steps)}

    def close(self) -> None:
        """Nothing of its own."""


class EnsembleKind:
    """`find` gives the step models, which must be in service before the ensemble is loaded."""

    name = "ensemble"

    def __init__(self, find: Find, submit: Submit) -> None:
        self._find, self._submit = find, submit

    def complete(self, config: ModelConfig, folder: Path | None, default_max_batch: int) -> None:
        """Ensembles are written out in full."""

    def load(self, config: ModelConfig, folder: Path) -> EnsembleModel:
        name = config.name
        if not config.ensemble_scheduling.step:
            raise invalid(f"must specify 'step' for ensemble '{name}'")
        kinds = {t.name: datatype(t.data_type) for t in config.input}
        steps = [self._step(name, given, kinds) for given in config.ensemble_scheduling.step]
        made = Counter(o for s in steps for o in s.outputs.values()) + Counter(t.name for t in config.input)
        twice = sorted(n for n, count in made.items() if count > 1)
        if twice:
            raise invalid(f"ensemble '{name}': tensors {twice} are produced more than once")
        for step in steps:
            self._check_inputs(name, step, kinds)
        for output in config.output:
            if kinds.get(output.name) != datatype(output.data_type):
                got = kinds.get(output.name, "not produced by any step")
                raise invalid(f"ensemble '{name}': output '{output.name}' is {datatype(output.data_type)} in its "
                              f"configuration, but {got}")  # fmt: skip
        if any(step.decoupled for step in steps):
            if config.response_cache.enable:
                raise invalid(f"response cache is not available for model {name}, which has a decoupled step")
            config.model_transaction_policy.decoupled = True
        outputs = tuple(t.name for t in config.output)
        limit = config.ensemble_scheduling.max_inflight_requests
        plan = Plan(name, tuple(steps), outputs, config.max_batch_size > 0, limit)
        return EnsembleModel(plan, self._submit, self._find)

    def _step(self, ensemble: str, given: object, kinds: dict[str, str]) -> Step:
        """Notes the types of the tensors that the step produces."""
        model, version = given.model_name, given.model_version  # type: ignore[attr-defined]
        wanted = "" if version in (-1, 0) else str(version)
        signature = self._signature(ensemble, model, wanted)
        step = Step(
            model, wanted, dict(given.input_map), dict(given.output_map), signature.max_batch > 0,  # type: ignore[attr-defined]
            signature.decoupled,
        )  # fmt: skip
        for theirs, ours in step.outputs.items():
            kinds.setdefault(ours, _port(ensemble, model, "output", theirs, signature.outputs).datatype)
        return step

    def _signature(self, ensemble: str, model: str, version: str) -> Signature:
        if model == ensemble:
            raise invalid(f"ensemble '{ensemble}' contains itself")
        try:
            signature = self._find(model, version).signature
        except ServeError as exc:
            raise ServeError(exc.status, f"ensemble '{ensemble}' depends on '{model}': {exc.message}") from exc
        return signature

    def _check_inputs(self, ensemble: str, step: Step, kinds: dict[str, str]) -> None:
        signature = self._signature(ensemble, step.model, step.version)
        for theirs, ours in step.inputs.items():
            port = _port(ensemble, step.model, "input", theirs, signature.inputs)
            if ours not in kinds:
                raise invalid(f"ensemble '{ensemble}': no step produces '{ours}', which input '{theirs}' of model "
                              f"'{step.model}' reads")  # fmt: skip
            if kinds[ours] != port.datatype:
                raise invalid(f"ensemble '{ensemble}': tensor '{ours}' is {kinds[ours]}, but input '{theirs}' of model "
                              f"'{step.model}' is {port.datatype}")  # fmt: skip
        missing = [n for n, p in signature.inputs.items() if not p.optional and n not in step.inputs]
        if missing:
            raise invalid(f"ensemble '{ensemble}': inputs {missing} of model '{step.model}' are not mapped")


def step_models(config: ModelConfig) -> list[str]:
    """The models that an ensemble's configuration names."""
    return sorted({step.model_name for step in config.ensemble_scheduling.step})


def _port(ensemble: str, model: str, kind: str, name: str, ports: dict[str, Port]) -> Port:
    if name not in ports:
        raise invalid(f"ensemble '{ensemble}': model '{model}' has no {kind} '{name}', only {', '.join(ports)}")
    return ports[name]
