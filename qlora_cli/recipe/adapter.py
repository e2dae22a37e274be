"""The recipe's section `adapter`: what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_cli.recipe.base import SHARD, Base
from qlora_cli.recipe.section import NoEffect, Section

Rank = Annotated[int, Field(ge=1, le=65536)]
Alpha = Annotated[float, Field(gt=0)]

PISSA, LOFTQ = "pissa", "loftq"
INITS = (PISSA, LOFTQ)
"""Values of `init` with which training begins with B A that is not 0."""


class Adapter(Section):
    """What is trained."""

    method: Literal["lora", "dora", "full", "head"] = "lora"
    """lora trains the adapter matrices A and B; dora also the length of each row of an adapted
    weight (Liu 2024), which takes more time. For comparison, full trains every weight of the base
    (full fine-tuning) and head trains the head of a classifier alone."""
    rank: Rank = 16
    """LoRA rank, the number of rows of A and columns of B; a higher rank trains more parameters and
    needs more memory."""
    alpha: Alpha = 32.0
    """The adapter's output is multiplied by alpha / rank, or by alpha / sqrt(rank) with rslora;
    change it together with rank to keep this factor."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of the adapter's inputs that is set to zero in training; raise it if the held-out
    loss rises while the training loss falls."""
    targets: Literal["all"] | list[str] = Field(default=["q", "v"])
    """Linear layers that get an adapter: roles (q k v o gate up down, the same names for every
    family), exact module paths, or `all`; more layers need more memory. Experts of a mixture get
    adapters only if the list contains `experts`, as in [all, experts]."""
    dtype: Literal["float32", "float16"] = "float32"
    """Dtype of A and B; float16 halves the size of the adapter file and can overflow."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023), for high ranks."""
    from_: Annotated[str | None, Field(alias="from")] = None
    """Start from the adapter of this run, checkpoint or PEFT folder, which must have the same
    targets, rank, alpha and dtype; null starts with B = 0."""

    ranks: dict[str, Rank] = Field(default={})
    """Rank of single roles in place of `rank`, such as {q: 8, down: 32}; roles of a fused linear
    have one rank."""
    alphas: dict[str, Alpha] = Field(default={})
    """Alpha of single roles in place of `alpha`, in the same way as `ranks`."""
    lr_ratio: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Learning rate of B divided by that of A, which is `train.lr` (LoRA+, Hayou 2024); the paper
    uses 16 with a lower `train.lr`."""

    init: Literal["default", "pissa", "loftq"] = "default"
    """First values of A and B: default draws A and sets B to 0. pissa (Meng 2024) sets them to the
    principal part of the weight, and the frozen base is the rest of it. loftq (Li 2023) sets them
    to the principal part of the quantization error. Both make a 4-bit base more exact, and loading
    takes more time."""

    prefix: Annotated[int, Field(ge=0, le=4096)] = 0
    """Number of trained keys and values before every row, in each block (prefix-tuning, Li and
    Liang 2021), together with A and B; 0 for none. They take N positions and cannot be merged."""

    @property
    def is_initialized(self) -> bool:
        """Return whether training begins with B A that is not 0."""
        return self.init in INITS

    @property
    def has_layers(self) -> bool:
        """Return whether linears get an adapter, so that rank, alpha and targets have an effect."""
        return self.method not in ("full", "head")

    @model_validator(mode="after")
    def _settings_match_method(self) -> Adapter:
        lora_only = sorted(name.rstrip("_") for name in self.model_fields_set - {"method"})
        if not self.has_layers and lora_only:
            raise NoEffect(
                f"{', '.join(lora_only)}: no effect with method: {self.method}",
                {f"adapter.{name}": "adapter.method" for name in lora_only},
            )
        if self.is_initialized and self.method != "lora":
            raise ValueError(f"init: {self.init} needs method: lora, and method is {self.method}")
        if self.is_initialized and self.from_ is not None:
            raise NoEffect(
                f"init: {self.init} sets the first values of A and B, and so does from; omit one",
                {"adapter.init": "adapter.from", "adapter.from": "adapter.init"},
            )
        if not self.targets:
            raise ValueError("targets is empty; nothing would be trained")
        return self

    @property
    def may_be_sharded(self) -> bool:
        """Return whether the section supports `base.residency: shard`."""
        return not self.prefix and not self.is_initialized

    def check_with(self, task: str, base: Base) -> None:
        """Raise ValueError if the section does not apply to the recipe's other settings."""
        if self.method == "head" and task != "classification":
            raise ValueError(
                "adapter.method: head trains the head of a classifier and needs task: "
                f"classification, and task is {task}; use lora, dora or full"
            )
        if self.prefix:
            self._check_prefix(task, base)
        if not self.is_initialized:
            return
        what = f"adapter.init: {self.init}"
        if self.init == LOFTQ and base.all_bits == {16}:
            raise ValueError(
                f"{what} begins with the quantization error of the base, and a base of 16 bit has "
                "none; use pissa, or base.bits=4"
            )
        if task == "preference":
            raise ValueError(f"{what} does not support task: preference")
        if base.residency == SHARD:
            raise ValueError(f"{what} does not support base.residency: {SHARD}")
        if self.init == PISSA and (base.residency == "disk" or base.cache is True):
            other = "base.residency: disk" if base.residency == "disk" else "base.cache: true"
            raise ValueError(
                f"{what} gives each run a base of its own, of which no packed copy is kept; omit "
                f"{other}"
            )

    def _check_prefix(self, task: str, base: Base) -> None:
        """Raise ValueError if `prefix` does not apply to the recipe's other settings."""
        if task != "causal":
            raise ValueError(f"adapter.prefix does not support task: {task}; omit it")
        if self.is_initialized:
            raise ValueError(f"adapter.prefix does not support adapter.init: {self.init}; omit one")
        if base.residency == SHARD:
            raise ValueError(f"adapter.prefix does not support base.residency: {SHARD}; omit one")
