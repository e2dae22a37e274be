"""A small model of a base's type in a temporary folder, as transformers' model and as ours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.adapters.adapted_modules import adapted_modules
from qlora_cli.adapters.targets import ALL, EXPERTS
from qlora_cli.data.collate import Batch
from qlora_cli.data.encode import Example
from qlora_cli.errors import QloraError
from qlora_cli.files.composed import text_config_of, whole_config
from qlora_cli.files.locate import read_config
from qlora_cli.memory.device import profile_of
from qlora_cli.models.build import ModelRequest, build, skeleton
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.composed import auto_class, language_model_path
from qlora_cli.models.derive import dropout_keys
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.registry import unsupported
from qlora_cli.proof.small_config import small_config
from qlora_cli.recipe.base import Bits
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.classification import CLASSIFICATION, ClassificationTask
from qlora_cli.tasks.task import Task

CPU = torch.device("cpu")
_MAX_PARAMETERS = 2_000_000
_MAX_OTHER_PARAMETERS = 20_000_000
"""The limit for the head and the other parts of a composed model, which are only stored."""
_FIRST_TOKEN = 7
"""Smaller ids may be special tokens."""


@dataclass(frozen=True)
class SmallModel:
    """A small random model of the same type as a base.

    folder: its checkpoint in float16, as transformers writes it. config: read from there. task: the
    task that is proved.
    """

    folder: Path
    config: Any
    task: Task

    @cached_property
    def reference(self) -> Any:
        """Transformers' own model in float32, with transformers' own attention."""
        model = auto_class(self.config, self.task.model_class).from_pretrained(
            self.folder, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
        )
        text_config_of(model).use_cache = False
        return model.eval()

    def recipe(self, bits: Bits = 16, *, activation_checkpointing: bool = False) -> Recipe:
        """Return the recipe of the laws: float32, LoRA on all linears and experts."""
        content = {
            "model": {"name": str(self.folder)},
            "base": {"bits": bits, "compute_dtype": "float32"},
            "adapter": {"rank": 2, "alpha": 4.0, "targets": self.targets},
            "data": {"train": ""},
            "train": {"activation_checkpointing": activation_checkpointing},
        }
        if isinstance(self.task, ClassificationTask):
            settings = self.task.settings.model_dump(mode="json", exclude_unset=True)
            content |= {"task": self.task.name, "classification": settings}
        recipe = Recipe.model_validate(content)
        return resolve(recipe, profile_of(CPU))[0]

    @cached_property
    def targets(self) -> list[str]:
        """The targets of the adapter: everything that can be adapted."""
        family = skeleton(self.config, torch.float32, self.task.model_class)[1]
        return [ALL, EXPERTS] if family.experts else [ALL]

    def request(self, recipe: Recipe) -> ModelRequest:
        """Return the request for this package's model."""
        return ModelRequest(
            recipe,
            self.config,
            lambda _, family: open_source(self.folder, family),
            CPU,
            profile_of(CPU),
            model_class=self.task.model_class,
        )

    @cached_property
    def loaded(self) -> LoadedModel:
        """This package's model in 16 bit, with random values in B. Most laws share it."""
        return self.build()

    @contextmanager
    def without_adapter(self) -> Iterator[LoadedModel]:
        """Give `loaded` with zeros in B inside the block."""
        factors = _all_b(self.loaded)
        values = [b.detach().clone() for b in factors]
        for b in factors:
            b.data.zero_()
        try:
            yield self.loaded
        finally:
            for b, value in zip(factors, values, strict=True):
                b.data.copy_(value)

    def build(
        self, bits: Bits = 16, *, activation_checkpointing: bool = False, with_adapter: bool = True
    ) -> LoadedModel:
        """Return this package's model of the same files, with random values in B.

        with_adapter: False leaves the zeros in B, so that the adapter has no effect.
        """
        recipe = self.recipe(bits, activation_checkpointing=activation_checkpointing)
        loaded = build(self.request(recipe))
        generator = torch.Generator().manual_seed(3)
        for b in _all_b(loaded) if with_adapter else ():
            b.data.normal_(std=0.05, generator=generator)
        return loaded

    def batch(self, *lengths: int) -> Batch:
        """Return a batch of rows of these lengths, with a target at every position."""
        return self.task.collate(self.rows(*lengths))

    def rows(self, *lengths: int) -> Sequence[Example]:
        """Return rows of random tokens, with labels 0 and 1 in turn, the same in every call."""
        generator = torch.Generator().manual_seed(1)
        rows = [
            torch.randint(_FIRST_TOKEN, self.config.vocab_size, (length,), generator=generator)
            for length in lengths
        ]
        has_labels = self.task.name == CLASSIFICATION.name
        return [
            Example(
                row.tolist(), row.tolist(), f"row {i}", value=float(i % 2) if has_labels else None
            )
            for i, row in enumerate(rows)
        ]


def _all_b(loaded: LoadedModel) -> list[nn.Parameter]:
    return [b for _, layer in adapted_modules(loaded.model) for b in layer.lora_b.parameters()]


@contextmanager
def small_model(config: Any, task: Task) -> Iterator[SmallModel]:
    """Write a small model of the type of `config`, and remove it after the block.

    config: transformers' config of the base. Raises ModelError if no small model can be made.
    """
    with TemporaryDirectory(prefix="qlora-proof-") as name:
        folder = Path(name)
        try:
            _create(config, task).to(torch.float16).save_pretrained(folder)
        except QloraError:
            raise
        except Exception as error:  # Code of any model class runs here.
            fault = str(error).strip().splitlines()[0]
            reason = f"no small model of it can be made for a proof: {fault}"
            raise unsupported(config, reason) from error
        yield SmallModel(folder, read_config(folder / "config.json"), task)


def _create(config: Any, task: Task) -> Any:
    """Return a small random model of the type of `config`, without dropout, in float32."""
    small = small_config(config)
    for key in dropout_keys(small):
        setattr(small, key, 0.0)
    _check_size(task, small)
    # Vectors keep the values of the class, which may be random, plus noise.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class(config, task.model_class).from_config(
            whole_config(small), dtype=torch.float32, trust_remote_code=False
        )
    _fill(model)
    return model


def _check_size(task: Task, config: Any) -> None:
    """Raise ModelError if a config that should be small describes a large model."""
    with torch.device("meta"):
        model = auto_class(config, task.model_class).from_config(
            whole_config(config), trust_remote_code=False
        )
    language_model = model.get_submodule(language_model_path(model))
    own, number = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (language_model, model)
    )
    if own > _MAX_PARAMETERS or number - own > _MAX_OTHER_PARAMETERS:
        raise unsupported(
            config,
            "it cannot be proved on a small model, because settings that are not known decide its "
            f"size ({number:,} parameters)",
        )


def _fill(model: nn.Module) -> None:
    """Set random weights with which every part of the model has an effect on the logits.

    The rows of a table have the size of a block's output. With smaller ones the first blocks would
    decide everything, and rounding errors of float32 would grow from block to block.
    """
    generator = torch.Generator().manual_seed(0)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    done: set[int] = set()
    # A language model has the same values whether it is a part of a composed model or not.
    language_model = model.get_submodule(language_model_path(model))
    for parameter in (*language_model.parameters(), *model.parameters()):
        if id(parameter) in done or not parameter.is_floating_point():
            continue
        done.add(id(parameter))
        noise: Tensor = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if id(parameter) in tables:
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(noise * 0.1)
