"""The recipe schema: every setting with its type, bounds, default and description.

Settings are defined here, in `base.py`, in `adapter.py` and, for single tasks, in files of their
names. The string under a field is its description: it is shown in `qlora recipe schema`, in error
messages and in the documentation (`describe.py`). To add a setting, add a field here and the code
that reads it.

`auto` means that the program chooses the value, prints the choice with its reason and stores both
in `run.json` (`resolve.py`). Every setting either takes effect or is refused. A setting that has no
effect together with the others is refused if the user wrote it (`model_fields_set`) and accepted if
it is the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qlora_cli.recipe.adapter import Adapter
from qlora_cli.recipe.base import SHARD, Base
from qlora_cli.recipe.classification import Classification, Metric
from qlora_cli.recipe.preference import Preference
from qlora_cli.recipe.section import NoEffect, Section

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]

DataFormat = Literal[
    "text", "completion", "alpaca", "sharegpt", "messages", "tokens", "preference", "classification"
]
LongRows = Literal["drop", "truncate", "split", "error"]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
Schedule = Literal["cosine", "linear", "constant"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

MAX_SEQ_LEN = 2**30
"""Largest value of `data.seq_len`; no row reaches it."""
MIN_SEQ_LEN = 8
"""Smallest value of `data.seq_len`."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1, le=2**20)]


class Model(Section):
    """The base model."""

    name: str
    """Base model: a Hugging Face Hub id, a folder with config.json and safetensors files, or
    `starter`, the small base embedded in the package."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; set a commit to get the same files every time."""


class Source(Section):
    """One source of rows in a mixture."""

    path: str
    """A file, folder, pattern or dataset id."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used: 2 uses it twice, 0.5 uses half of the rows, chosen by
    `data.seed`."""


Sources = str | list[str | Source]
"""One or several places that rows are read from."""


class Data(Section):
    """Training rows and held-out rows."""

    train: Sources
    """Training rows: a JSONL, JSON, CSV, TSV, Parquet, TXT or Markdown file (also .gz or .zst), a
    folder, a pattern such as `data/*.jsonl`, a dataset id on the Hugging Face Hub, or
    `starter:train`, the rows embedded in the package; or a list of these, each optionally as
    {path, weight}."""
    eval: Sources | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Held-out rows, given in the same way as `train`; a number such as 0.02 holds out this
    share of the rows that are used; null trains without evaluation."""
    format: Literal["auto"] | DataFormat = "auto"
    """Fields of each row (`?`: optional); text: {text}; completion: {prompt, completion};
    alpaca: {instruction, output, input?, system?, tools?}; sharegpt: {conversations, system?,
    tools?}; messages: {messages, tools?, functions?}; tokens: {input_ids, labels?,
    attention_mask?}; preference: {chosen, rejected, prompt?, tools?} for task: preference;
    classification: {text, label, text_pair?} for task: classification; auto detects the format
    from the field names."""
    seq_len: Annotated[int, Field(ge=MIN_SEQ_LEN, le=MAX_SEQ_LEN)] = 1024
    """Maximum length of a sequence in tokens, also the length that packing fills; `long_rows`
    applies to longer rows, and memory for activations grows with it."""
    long_rows: Literal["auto"] | LongRows = "auto"
    """What happens to rows that are longer than `seq_len` or than the model's positions: drop
    leaves them out, truncate removes their end, split cuts them into consecutive pieces, error
    stops; auto splits `text` rows, truncates `classification` rows, whose last token stays, and
    drops other rows. The number of rows is reported."""
    template: str | None = None
    """Chat template in place of the base's own: alpaca, chatml, or the path of a Jinja file; it is
    stored in the run, the adapter's folder and the merged model. null uses the base's."""
    system: str | None = None
    """System prompt of every row that has none; a template without system prompts gets it in front
    of the first user message."""
    columns: dict[str, str] | None = None
    """Columns that have other names than the fields of the format, as field: column, such as
    {prompt: question, completion: answer}."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use at most this number of training rows, chosen by `seed`; null uses all."""
    seed: Seed = 0
    """Seed that chooses the rows of `eval` as a share, of weights and of `max_rows`."""
    cache: bool = True
    """Keep the tokens of large files on disk for later runs with the same rows and tokenizer
    (`qlora cache list`)."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Number of processes that tokenize; null uses one per CPU core if there are many rows."""
    packing: bool = True
    """Put several rows into one sequence instead of padding; attention, positions and loss do not
    cross the boundary between rows."""

    @model_validator(mode="after")
    def _lists_have_items(self) -> Data:
        for name in ("train", "eval", "columns"):
            if getattr(self, name) in ([], {}):
                raise ValueError(f"{name} is empty")
        return self


class Train(Section):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0, le=10**9)] = 1.0
    """Number of passes over the training rows; set either `epochs` or `steps`."""
    steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Number of optimizer steps; null computes it from `epochs`."""
    micro_batch: Literal["auto"] | Count = 1
    """Sequences per forward pass; a larger value trains faster and needs more memory. auto divides
    the grad_accum sequences of a step into the fewest passes that fit the memory."""
    grad_accum: Count = 8
    """Forward and backward passes per optimizer step; one step uses micro_batch x grad_accum
    sequences. Several processes (`qlora train --processes`) share these passes."""
    loss_chunk: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Tokens whose logits exist at once in the loss; fewer need less memory and more time. auto
    chooses so many that the loss never decides the peak memory."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    """Peak learning rate; lower it if the loss diverges."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: cosine and linear decrease it to 0, constant keeps it."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03
    """Fraction of the steps in which the learning rate rises linearly to `lr`."""
    optimizer: Optimizer = "adamw"
    """adamw stores its states in 32 bit, adamw8bit in 8 bit; paged_* stores them in memory that the
    driver moves to the CPU if the GPU runs short, and needs a GPU."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of AdamW, applied to every trained weight."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Scale gradients down to this total norm if it is exceeded; null disables clipping."""
    update_in_backward: bool = False
    """Update the weights of a block as soon as the backward pass has all their gradients, and free
    these: a step has the gradients of one block and not of all. Needs grad_accum: 1,
    max_grad_norm: null, one process and no float16."""
    activation_checkpointing: Literal["auto"] | bool | Annotated[int, Field(ge=0)] = "auto"
    """Store only the input of a block and compute the rest again in the backward pass: true for
    every block, false for none, a number for that many first blocks; auto recomputes as few as fit
    the memory."""
    offload_inputs: Literal["auto"] | bool = "auto"
    """Keep the inputs of recomputed blocks in host memory and copy them back in the backward pass;
    needs a GPU. auto does it if recomputing every block does not fit the memory otherwise."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: Annotated[int, Field(ge=1)] | None = 2
    """Number of last checkpoints that are kept; older ones are removed, except that of the lowest
    held-out loss; null keeps all."""
    eval_every: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    """Optimizer steps between two evaluations on `data.eval`, or a share of an epoch such as 0.25;
    null evaluates before the first and after the last step only."""
    keep_best: bool | Metric = True
    """Export the weights of the evaluated step with the lowest held-out loss, and write a
    checkpoint of it; the name of a metric, for task: classification, means its highest value
    instead; false exports those of the last step."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this number of evaluations in a row without a better one, as `keep_best` compares
    them; null trains all steps."""
    log_to: list[Tracker] = Field(default=[])
    """Trackers that receive the recipe and the figures of each step and evaluation: tensorboard
    writes to the run's folder, the others use their own login and environment variables."""
    seed: Seed = 0
    """Seed of A's initial values, of the order of the rows and of dropout."""

    @property
    def pass_size(self) -> int:
        """Number of sequences per forward pass. It must not be `auto` any more."""
        assert self.micro_batch != "auto", "a plan chooses the micro-batch first"
        return self.micro_batch

    @model_validator(mode="after")
    def _updates_need_one_pass(self) -> Train:
        has_sum = self.grad_accum != 1 or self.micro_batch == "auto"
        if self.update_in_backward and (has_sum or self.max_grad_norm is not None):
            raise ValueError(
                "update_in_backward frees gradients before they can be added up or clipped; set "
                "train.grad_accum=1, train.micro_batch to a number and train.max_grad_norm=null"
            )
        return self

    @model_validator(mode="after")
    def _offload_has_inputs(self) -> Train:
        if self.offload_inputs is True and self.activation_checkpointing is False:
            what = (
                "train.offload_inputs needs blocks that train.activation_checkpointing recomputes"
            )
            raise NoEffect(what, {"train.offload_inputs": "train.activation_checkpointing"})
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise NoEffect(
                "steps and epochs are both set; leave one out",
                {"train.epochs": "train.steps", "train.steps": "train.epochs"},
            )
        return self


class Recipe(Section):
    """A fine-tuning job."""

    model: Model
    base: Base = Base()
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    task: Literal["causal", "classification", "preference"] = "causal"
    """causal trains next-token prediction; preference trains on pairs of a chosen and a rejected
    answer; classification predicts a label or a number for each text."""
    preference: Preference = Preference()
    classification: Classification = Classification()
    output: str = "runs/{name}"
    """Folder of the run or of the sweep; {name} is replaced by the name of the recipe file without
    its suffix."""

    @model_validator(mode="before")
    @classmethod
    def _tasks_have_one_format(cls, content: Any) -> Any:
        """Set `data.format` for a task whose rows may have the fields of other formats."""
        task = content.get("task") if isinstance(content, dict) else None
        if task in ("preference", "classification"):
            data = content.get("data")
            if isinstance(data, dict) and data.get("format", "auto") == "auto":
                return content | {"data": data | {"format": task}}
        return content

    @model_validator(mode="after")
    def _evaluations_have_rows(self) -> Recipe:
        train = self.train
        for name in ("eval_every", "keep_best", "patience"):
            if name in train.model_fields_set and getattr(train, name) and self.data.eval is None:
                what = f"train.{name} needs held-out rows; set data.eval"
                raise NoEffect(what, {f"train.{name}": "data.eval"})
        if train.patience is not None and train.eval_every is None:
            what = "train.patience needs evaluations in training; set train.eval_every"
            raise NoEffect(what, {"train.patience": "train.eval_every"})
        return self

    @model_validator(mode="after")
    def _full_is_not_quantized(self) -> Recipe:
        if self.adapter.method == "full" and self.base.all_bits != {16}:
            raise ValueError(
                "adapter.method: full trains the weights of the base, and quantized weights cannot "
                "be trained; set base.bits=16"
            )
        return self

    @model_validator(mode="after")
    def _streamed_is_frozen(self) -> Recipe:
        base = self.base
        if not base.moves_blocks:
            return self
        if self.adapter.method != "lora":
            raise ValueError(
                f"base.residency: {base.residency} supports adapter.method: lora, and not "
                f"{self.adapter.method}"
            )
        # Host memory and disk have the embedding and the head, too.
        if base.residency == SHARD and self.train.activation_checkpointing in (False, 0):
            raise ValueError(
                f"base.residency: {SHARD} moves the blocks that are recomputed, and "
                "train.activation_checkpointing recomputes none; set it to true or to a number"
            )
        return self

    @model_validator(mode="after")
    def _task_settings_match(self) -> Recipe:
        data, initial = self.data, self.adapter.from_
        self.adapter.check_with(self.task, self.base)
        self.preference.check_with(self.task, data.format, data.long_rows, initial)
        self.classification.check_with(self.task, data.format, data.long_rows, self.best_metric)
        return self

    @property
    def best_metric(self) -> Metric | None:
        """Return the metric whose highest value is the best step; None for the lowest loss."""
        best = self.train.keep_best
        return None if isinstance(best, bool) else best
