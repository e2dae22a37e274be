"""The adapter methods by the name that a recipe gives in `adapter.method`."""

from __future__ import annotations

from collections.abc import Callable

from qlora_cli.adapters.dora_method import DoraMethod
from qlora_cli.adapters.full import FullFineTuning
from qlora_cli.adapters.head_method import HeadMethod
from qlora_cli.adapters.lora_method import LoraMethod
from qlora_cli.adapters.method import AdapterMethod
from qlora_cli.recipe.adapter import Adapter

METHODS: dict[str, Callable[[Adapter], AdapterMethod]] = {
    LoraMethod.name: LoraMethod.from_recipe,
    DoraMethod.name: DoraMethod.from_recipe,
    FullFineTuning.name: FullFineTuning.from_recipe,
    HeadMethod.name: HeadMethod.from_recipe,
}
"""Name -> function that creates the method from the recipe's section `adapter`."""


def method_of(section: Adapter) -> AdapterMethod:
    """Return the method that the recipe's section `adapter` names."""
    return METHODS[section.method](section)
