"""`qlora models`: the model types that can be trained, and the proof of one of them."""

from __future__ import annotations

from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.files.locate import find_config, read_config
from qlora_cli.jobs.model_results import MeasuredLaw, ModelsResult, ModelType
from qlora_cli.models.build import skeleton
from qlora_cli.models.limits import limits_of
from qlora_cli.models.registry import FAMILIES, known_family
from qlora_cli.models.sites import find_sites, find_stacks
from qlora_cli.proof.prove import LAWS, ModelProof, proof_of, stored_proofs
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.tasks.classification import CLASSIFICATION, task_of_model
from qlora_cli.tasks.task import Task


def run(where: str | None, *, observer: Observer) -> ModelsResult:
    """Return the known model types, or prove one.

    where: a hub id, a model's folder or a config file; None for the list. An encoder is proved as a
    classifier. Raises ModelError if it is not found, or if no family can describe it.
    """
    if where is None:
        return ModelsResult((*_tested(), *map(_summary, stored_proofs())))
    config = read_config(find_config(where, None))
    task, roles = _task_and_roles(config)
    if known_family(config) is not None:
        (known,) = (item for item in _tested() if item.model_type == config.model_type)
        return ModelsResult((known,), roles)
    proof = proof_of(config, task, observer)
    notes = limits_of(config, task.model_class)
    return ModelsResult((_summary(proof),), roles, _measured(proof), notes)


def _tested() -> list[ModelType]:
    return [
        ModelType(name, "tested", "by the test suite")
        for family in FAMILIES
        for name in family.model_types
    ]


def _summary(proof: ModelProof) -> ModelType:
    failed = proof.failed
    if failed is None:
        detail = f"{len(proof.results)} laws, transformers {proof.versions['transformers']}"
        if proof.task != CAUSAL.name:
            detail += f", for task: {proof.task}"
        return ModelType(proof.model_type, "proved", detail)
    return ModelType(proof.model_type, "refused", f"{failed.law}: {failed.error or failed.value}")


def _task_and_roles(config: Any) -> tuple[Task, tuple[str, ...]]:
    """Return the task that a model can be trained for, and the roles of its linears.

    A language model can be a classifier, too. An encoder can be nothing else.
    """
    task: Task = task_of_model(config) or CAUSAL
    try:
        return task, _roles(config, task)
    except ModelError:
        if not _is_encoder(config):
            raise
    return CLASSIFICATION, _roles(config, CLASSIFICATION)


def _is_encoder(config: Any) -> bool:
    """Return whether a classifier of this type does not predict from the last token."""
    try:
        _, family = skeleton(config, torch.float32, CLASSIFICATION.model_class)
        return family.classifier.pooling != "last"
    except ModelError:
        return False


def _roles(config: Any, task: Task) -> tuple[str, ...]:
    """Return the roles of the model's linears and experts, in the model's order."""
    model, family = skeleton(config, torch.float32, task.model_class)
    sites = [*find_sites(model, family, model.config), *find_stacks(model, family)]
    return tuple(dict.fromkeys(role for site in sites for role in site.roles))


def _measured(proof: ModelProof) -> tuple[MeasuredLaw, ...]:
    laws = {law.name: law for law in LAWS}
    return tuple(
        MeasuredLaw(
            text=laws[result.law].text,
            value=result.value,
            limit=laws[result.law].limit,
            is_lower_bound=laws[result.law].is_lower_bound,
            holds=result.holds,
            error=result.error,
        )
        for result in proof.results
    )
