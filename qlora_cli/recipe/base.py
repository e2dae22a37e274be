"""The settings of the frozen base."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_cli.recipe.section import NoEffect, Section
from qlora_cli.units import parse_bytes

Bits = Literal[4, 8, 16]
Dtype = Literal["float32", "float16", "bfloat16"]

SHARD = "shard"
"""Value of `residency` of a base that is sharded over the processes of a job."""
_BITS_OF: dict[str, Bits] = {
    "quant_type": 4,
    "double_quant": 4,
    "scales": 4,
    "outlier_threshold": 8,
}
"""Setting -> the bits of the linears that it applies to."""


class Base(Section):
    """How the frozen base is stored and computed."""

    bits: Literal["auto"] | Bits = 4
    """Bits per quantized weight: 4 (NF4 or FP4) needs the least memory, 8 is LLM.int8(), 16 does
    not quantize; auto measures which linears need more than 4 and gives them what fits the memory
    (`qlora quantize`)."""
    budget: str | None = None
    """Memory of the base for bits: auto, such as 6GiB: linears, embeddings, head and norms; null
    uses what the job with a base of 4 bit leaves free."""
    overrides: dict[str, Bits] = Field(default={})
    """Bits of single linears in place of `bits`, such as {"*.down_proj": 8}, by role or by a glob
    of their names; of several matching entries the last counts."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type: nf4 has its 16 values at the quantiles of a normal distribution, fp4 is a
    4-bit float; applies to bits: 4."""
    double_quant: bool = True
    """Quantize the scales of the 4-bit blocks too, 4.127 instead of 4.5 bits per weight; applies to
    bits: 4."""
    scales: Literal["absmax", "search", "measured"] = "absmax"
    """How the scale of a 4-bit block is chosen: absmax, as bitsandbytes does, is its largest
    absolute value; search takes the scale with the lowest squared error; measured weights these
    errors by the inputs of each linear on at most 64 rows, which is the most accurate. All need the
    same memory; applies to bits: 4."""
    importance: str | None = None
    """File of the inputs' mean squares for scales: measured; null measures them when the training
    starts, and keeps them in the run's folder."""
    outlier_threshold: Annotated[float, Field(ge=0.0)] = 6.0
    """Multiply input columns with an absolute value above this threshold in 16 bit, 0 disables it;
    applies to bits: 8."""
    compute_dtype: Literal["auto"] | Dtype = "auto"
    """Dtype of activations and matrix products; auto selects bfloat16 on a GPU with bfloat16 units,
    float16 on an older GPU and float32 on a CPU."""
    residency: Literal["auto", "device", "host", "disk", "shard"] = "auto"
    """Memory that stores the packed base: device is that of the GPU or CPU that computes. host is
    host memory for the embedding, the head and the blocks that are recomputed
    (train.activation_checkpointing); each block and each piece of the head is copied to the GPU
    when it computes, which is slower. disk reads the same from the packed copy (cache), so that the
    host memory may be smaller than the base. shard gives each of several processes (`qlora train
    --processes`) a part of these blocks and of their adapter, which they exchange when a block
    computes. auto selects device if the job fits the GPU, else shard for several processes if it
    fits then, else host."""
    cache: Literal["auto"] | bool = "auto"
    """Keep a packed copy of the base on disk, so that later starts need not quantize it (`qlora
    cache list`); auto keeps a base of more than 64 MiB if bits is 4 or 8."""

    @property
    def default_bits(self) -> Bits:
        """Bits of a linear without an override. They must not be `auto` any more."""
        assert self.bits != "auto", "the bits are chosen first"
        return self.bits

    @property
    def is_streamed(self) -> bool:
        """Return whether blocks, embedding and head are copied to the device when they compute."""
        return self.residency in ("host", "disk")

    @property
    def moves_blocks(self) -> bool:
        """Return whether recomputed blocks get their weights when they compute."""
        return self.is_streamed or self.residency == SHARD

    @property
    def all_bits(self) -> set[Bits]:
        """Return the bits that linears of the base have, or may get."""
        if self.bits == "auto":
            return {4, 8, 16}
        return {self.bits, *self.overrides.values()}

    def without_quantization(self) -> Base:
        """Return the settings with the defaults of those that apply to 4 or 8 bit only."""
        names = (*_BITS_OF, "importance")
        defaults = {name: type(self).model_fields[name].default for name in names}
        return self.model_copy(update=defaults)

    @model_validator(mode="after")
    def _auto_chooses(self) -> Base:
        if self.bits == "auto" and self.overrides:
            what = "overrides have no effect with bits: auto, which chooses them"
            raise NoEffect(what, {"base.overrides": "base.bits"})
        if self.budget is None:
            return self
        if self.bits != "auto":
            what = f"budget applies to bits: auto only, and bits is {self.bits}"
            raise NoEffect(what, {"base.budget": "base.bits"})
        parse_bytes(self.budget)
        return self

    @model_validator(mode="after")
    def _importance_is_measured(self) -> Base:
        if self.importance is not None and self.scales != "measured":
            what = f"importance applies to scales: measured only, and scales is {self.scales}"
            raise NoEffect(what, {"base.importance": "base.scales"})
        return self

    @model_validator(mode="after")
    def _disk_needs_the_copy(self) -> Base:
        if self.residency == "disk" and self.cache is False:
            raise ValueError(
                "residency: disk reads the base from its packed copy, and cache: false keeps none; "
                "omit cache"
            )
        return self

    @model_validator(mode="after")
    def _settings_match_bits(self) -> Base:
        for name, bits in _BITS_OF.items():
            if name in self.model_fields_set and bits not in self.all_bits:
                what = f"{name} applies to bits: {bits} only, and bits is {self.bits}"
                raise NoEffect(what, {f"base.{name}": "base.bits"})
        return self
