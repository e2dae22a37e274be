"""The recipe: every setting, its meaning and unit, its default. The only place that defaults stand.

`auto` means that the tool chooses, prints its choice with the reason and keeps both in `run.json`
(`resolve.py`). A setting is obeyed or refused, never ignored: what a combination makes meaningless
is refused here when the user wrote it (`model_fields_set`), and silent when it is only a default.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]

Bits = Literal[4, 8, 16]
Dtype = Literal["float32", "float16", "bfloat16"]
DataFormat = Literal["text", "completion", "alpaca", "sharegpt", "messages", "tokens"]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
Schedule = Literal["cosine", "linear", "constant"]


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors, values are never coerced across kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """Which base."""

    name: str
    """Hub id, a folder with config.json and safetensors, or `starter`, the embedded base."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


class Base(Section):
    """How the frozen base is held."""

    bits: Bits = 4
    """Of each quantized weight: 4 (bitsandbytes' NF4 or FP4), 8 (LLM.int8()), 16 (as it is)."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of a 4-bit weight."""
    double_quant: bool = True
    """Quantize the 4-bit blocks' scales too: 4.127 instead of 4.5 bit a weight."""
    outlier_threshold: Annotated[float, Field(ge=0.0)] = 6.0
    """8 bit: input columns with a value beyond it are multiplied in 16 bit; 0 turns that off."""
    compute_dtype: Literal["auto"] | Dtype = "auto"
    """Of activations and matrix products."""
    residency: Literal["auto", "device"] = "auto"
    """Where the packed base lives."""

    @model_validator(mode="after")
    def _settings_belong_to_bits(self) -> Base:
        for name, bits in (("quant_type", 4), ("double_quant", 4), ("outlier_threshold", 8)):
            if name in self.model_fields_set and self.bits != bits:
                raise ValueError(f"{name} belongs to bits: {bits}, and bits is {self.bits}")
        return self


class Adapter(Section):
    """What is trained."""

    method: Literal["lora", "full"] = "lora"
    """lora: A and B only; full: every weight, to compare with."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rows of A, columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's product is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the adapter's inputs set to zero while training."""
    targets: Literal["all"] | list[str] = ["q", "v"]
    """Roles (q k v o gate up down), the same for every family, or exact module paths; or `all`."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of A and B."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank): Kalajdzievski 2023."""

    @model_validator(mode="after")
    def _settings_belong_to_lora(self) -> Adapter:
        lora_only = self.model_fields_set - {"method"}
        if self.method == "full" and lora_only:
            raise ValueError(f"{', '.join(sorted(lora_only))}: these belong to method: lora")
        if not self.targets:
            raise ValueError("targets is empty; nothing would be trained")
        return self


class Data(Section):
    """Rows to train on and to hold out."""

    train: str
    """A JSONL, JSON, CSV or Parquet file, a hub dataset, or `starter:train`."""
    eval: str | None = None
    """Held-out rows, in the same formats."""
    format: Literal["auto"] | DataFormat = "auto"
    """text: {text}; completion: {prompt, completion}; alpaca: {instruction, input, output};
    sharegpt: {conversations}; messages: {messages}; tokens: {input_ids, labels}."""
    seq_len: Annotated[int, Field(ge=8)] = 1024
    """The longest sequence, in tokens; with packing, what each sequence is filled up to."""
    packing: bool = True
    """Lay several rows in one sequence; they never see each other."""


class Train(Section):
    """The loop."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the rows; `steps`, where given, decides instead."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""
    micro_batch: Annotated[int, Field(ge=1)] = 1
    """Sequences in one forward pass."""
    grad_accum: Annotated[int, Field(ge=1)] = 8
    """Forward passes in one optimizer step."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03
    """Share of the steps in which the learning rate rises."""
    optimizer: Optimizer = "adamw"
    """adamw; adamw8bit: states in 8 bit; paged_*: states move to the host when the card's memory
    is short, which needs a card."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled, on trained matrices."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradients are scaled down to this norm; null turns that off."""
    activation_checkpointing: bool = True
    """Keep only each block's input and compute the rest again in backward."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between two checkpoints; the last step always writes one."""
    seed: int = 0
    """Of A's values, the order of rows and dropout."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("steps and epochs are both given; leave one out")
        return self


class Recipe(Section):
    """A whole job."""

    model: Model
    base: Base = Base()
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    task: Literal["causal", "classification"] = "causal"
    """causal: the next token; classification is not built yet and refused."""
    output: str = "runs/{name}"
    """The run's folder; {name} is the recipe's file name without its ending."""

    @model_validator(mode="after")
    def _full_is_not_quantized(self) -> Recipe:
        if self.adapter.method == "full" and self.base.bits != 16:
            raise ValueError(
                "adapter.method: full trains the base's own weights, and packed weights cannot be "
                "trained; set base.bits=16"
            )
        if self.task == "classification":
            raise ValueError("task: classification is not supported by this version; use causal")
        return self
