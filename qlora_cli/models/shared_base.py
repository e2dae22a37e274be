"""One base for several training jobs. Each job gets a new adapter, and the base is loaded once."""

from __future__ import annotations

import gc
from typing import Any

from qlora_cli.adapters.method import AdapterMethod
from qlora_cli.adapters.registry import method_of
from qlora_cli.memory.scopes import unallocated
from qlora_cli.models import convert
from qlora_cli.models.attach import base_at
from qlora_cli.models.build import ModelRequest, apply_train_settings, build, initialize_adapter
from qlora_cli.models.importance import KEY as IMPORTANCE
from qlora_cli.models.importance import importance_digest, read_importance
from qlora_cli.models.initial_factors import InitialFactors
from qlora_cli.models.model import LoadedModel
from qlora_cli.recipe import activations
from qlora_cli.recipe.adapter import PISSA

_INIT = "adapter.init"


class SharedBase:
    """Builds the models of jobs that run one after the other.

    A job gets the base of the job before it if both need the same one and that job has not trained
    any weight of it. So at most one model of a `SharedBase` may be in use at any time.
    """

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self._method: AdapterMethod | None = None
        self._content: dict[str, Any] = {}

    def build(self, request: ModelRequest) -> LoadedModel:
        """Return the requested model, as `models.build.build` does. Raises the same errors.

        The observer of the request receives a note if the base is used again, or why not.
        """
        content = _base_content(request)
        if self._loaded is not None:
            reason = self._reason_to_load(content)
            if reason is None:
                _exchange_adapter(self._loaded, request)
                self._method = method_of(request.recipe.adapter)
                return self._loaded
            request.observer.note(f"the base is loaded again: {reason}")
            # The model has reference cycles. It must be gone before another one is loaded.
            self._loaded = None
            gc.collect()
        self._loaded = build(request)
        self._content, self._method = content, method_of(request.recipe.adapter)
        return self._loaded

    def _reason_to_load(self, content: dict[str, Any]) -> str | None:
        """Return why the base in memory cannot be used for a job; None if it can.

        content: of the job's base.
        """
        assert self._loaded is not None
        assert self._method is not None
        own = {id(parameter) for parameter in self._method.trained_parameters(self._loaded.model)}
        trained = self._loaded.trainable().items()
        if not self._method.freezes_base or any(id(p) not in own for _, p in trained):
            return "the run before has trained its weights"
        if PISSA in (content[_INIT], self._content[_INIT]):
            return f"{_INIT}: {PISSA} changes the base"
        changed = [key for key in content if key != _INIT and content[key] != self._content[key]]
        return ", ".join(f"{key} is {content[key]}" for key in changed) or None


def _base_content(request: ModelRequest) -> dict[str, Any]:
    """Return dotted key -> value of everything that a base depends on."""
    recipe = request.recipe
    freezes_base = method_of(recipe.adapter).freezes_base
    sections = {"model": recipe.model, "base": recipe.base}
    content = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.model_dump().items()
    }
    if (file := recipe.base.importance) is not None:
        # Each run has a file of its own.
        content[IMPORTANCE] = importance_digest(read_importance(file))
    return content | {
        "task": recipe.task,
        # Methods that freeze the base can follow each other on it.
        _INIT: recipe.adapter.init,
        "adapter.method": None if freezes_base else recipe.adapter.method,
        # The recomputed blocks are those whose weights are in host memory.
        activations.KEY: None
        if recipe.base.residency == "device"
        else recipe.train.activation_checkpointing,
    }


def _exchange_adapter(loaded: LoadedModel, request: ModelRequest) -> None:
    """Replace the adapter of `loaded` by a new one of the request's recipe."""
    method = method_of(request.recipe.adapter)
    loaded.adapted = method.adapted_roles([*loaded.sites, *loaded.stacks])
    with unallocated():
        for site in (*loaded.sites, *loaded.stacks):
            module, roles = base_at(loaded, site.path), loaded.adapted.get(site.path)
            if roles and site.num_experts:
                module = method.wrap_stack(module)
            elif roles:
                module = method.wrap(module, {role: site.rows[role] for role in roles})
            convert.replace_module(loaded.model, site.path, module)
    source = request.make_source(loaded.model, loaded.family)
    given = (request.recipe, request.device, request.adapter)
    initialize_adapter(loaded, request, source, InitialFactors.of(loaded, *given))
    apply_train_settings(loaded, request.recipe)
