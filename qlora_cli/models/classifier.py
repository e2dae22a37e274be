"""Sequence classifiers: transformers' class with the labels of a recipe, its family and its head.

A classifier is a backbone and, after it, a head: what pools the hidden states of a row and maps
them to one number per label. The head is transformers' own code, run with a stub in place of the
backbone. It gets one pooled state per row, so the rows of a batch need no padding there. Which
state that is, is measured: the head must compute the same of a row and of this state alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from qlora_cli.errors import ModelError
from qlora_cli.files.composed import is_composed, model_type_of
from qlora_cli.models.conversions import parameter_names
from qlora_cli.models.derive import derive_backbone
from qlora_cli.models.family import ClassifierHead, Family, Pooling
from qlora_cli.models.head import StubBackbone, with_module
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.registry import unsupported

_TOKENS = 4
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ClassifierClass:
    """transformers' AutoModelForSequenceClassification for some labels.

    labels: names of the classes by number; empty for one number to predict.
    """

    labels: tuple[str, ...] = ()

    __name__ = "AutoModelForSequenceClassification"

    def from_config(self, config: Any, **arguments: Any) -> Any:
        """Create the model with these labels. config: it is not modified."""
        from transformers import AutoModelForSequenceClassification

        config = deepcopy(config)
        for key, value in self.config_entries().items():
            setattr(config, key, value)
        return AutoModelForSequenceClassification.from_config(config, **arguments)

    def from_pretrained(self, folder: Any, **arguments: Any) -> Any:
        """Load a classifier with the labels of its own config."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(folder, **arguments)

    def config_entries(self) -> dict[str, Any]:
        """Return the entries of a config that state the labels."""
        names = self.labels or ("LABEL_0",)
        kind = "single_label_classification" if self.labels else "regression"
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": kind,
        }


def check_classifier(config: Any) -> None:
    """Raise ModelError if transformers has no classifier of this type, or one of several parts.

    config: of a base. The adapter of such a base can be trained on labels as answers instead.
    """
    model_type = model_type_of(config)
    if is_composed(config):
        what = f"model type {model_type!r} has several parts, and a classifier needs text alone"
    elif config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        what = f"transformers has no class that classifies texts for model type {model_type!r}"
    else:
        return
    raise ModelError(
        what,
        where="model.name",
        hint="use a base of text alone, such as answerdotai/ModernBERT-base or Qwen/Qwen3-0.6B; or "
        "set task: causal and write the label as the answer of each row",
    )


def is_classifier_class(model: Any) -> bool:
    """Return whether transformers' model classifies sequences."""
    return type(model).__name__.endswith("ForSequenceClassification")


def classifier_family(model: Any, known: Family | None) -> Family:
    """Return the family of a classifier on meta.

    known: the hand-written family of its backbone; None to derive it. Raises ModelError, with the
    reason, for a model that a `Family` cannot describe.
    """
    family = known if known is not None else derive_backbone(model, lambda _: "")
    trained = tuple(_trained_modules(model, family.backbone))
    head = _head_path(model, trained)
    backbone = model.get_submodule(family.backbone)
    own_attention = family.rows.own_attention
    accepted = inspect.signature(backbone.forward).parameters
    shapes = {
        f"{path}.{name}": tuple(parameter.shape)
        for path in trained
        for name, parameter in model.get_submodule(path).named_parameters()
    }
    return replace(
        family,
        head=head,
        classifier=ClassifierHead(
            modules=trained,
            shapes=shapes,
            pooling=_measured_pooling(model, family.backbone, trained, head),
            token_types="token_type_ids" in accepted and _has_token_types(model.config),
        ),
        # Attention of its own computes padded rows, as transformers does.
        rows=replace(family.rows, packs=False, mixers=()) if own_attention else family.rows,
        ignored=(*family.ignored, ".embeddings.position_ids"),
        rename=parameter_names(model, family.stacks, family.row_parts),
    )


def _has_token_types(config: Any) -> bool:
    return bool(getattr(config, "type_vocab_size", 0))


def _trained_modules(model: Any, backbone: str) -> list[str]:
    """Return the paths of the modules with parameters after the blocks of a classifier."""
    paths = [name for name, _ in model.named_children() if name != backbone.partition(".")[0]]
    if getattr(model.get_submodule(backbone), "pooler", None) is not None:
        paths = [f"{backbone}.pooler", *paths]
    return [path for path in paths if any(True for _ in model.get_submodule(path).parameters())]


def _head_path(model: Any, trained: Sequence[str]) -> str:
    """Return the path of the last linear, which has one output per label."""
    found = [
        f"{path}.{name}".rstrip(".")
        for path in trained
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not found:
        raise unsupported(model.config, "its class has no linear with one output per label")
    return found[-1]


def _measured_pooling(model: Any, backbone: str, trained: Sequence[str], head: str) -> Pooling:
    """Return which hidden state of a row the head of a model on meta gets."""
    model = _with_random_head(model, trained)
    linear: Any = model.get_submodule(head)
    width = int(model.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TOKENS, width, generator=generator, device="cpu")
    candidates: dict[Pooling, Tensor] = {
        "first": hidden[:, 0],
        "last": hidden[:, -1],
        "mean": hidden.mean(dim=1),
    }
    try:
        with torch.no_grad():
            expected = _class_forward(model, backbone, hidden)
            for pooling, pooled in candidates.items():
                found = linear(_head_inputs(model, backbone, head, pooling, pooled))
                if torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                    return pooling
    except Exception as error:  # Code of any model class runs here.
        fault = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"the code of its classification head cannot be examined: {fault[0]}"
        raise unsupported(model.config, reason) from error
    raise unsupported(
        model.config, "its classification head uses more than one token of a row, or its mean"
    )


def _with_random_head(model: Any, trained: Sequence[str]) -> Any:
    """Return a copy of a model on meta whose head has random values on the CPU."""
    generator = torch.Generator().manual_seed(1)
    for path in trained:
        module = deepcopy(model.get_submodule(path)).to_empty(device="cpu").float()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.1, generator=generator)
        model = with_module(model, path, module)
    return model


def pooled_states(family: Family, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the hidden state of each row that the head gets, (rows, d).

    hidden: (T, d), of all rows in order. lengths: tokens of each row.
    """
    rows = hidden.split(list(lengths))
    pooling = family.classifier.pooling
    if pooling == "mean":
        return torch.stack([row.mean(dim=0) for row in rows])
    place = 0 if pooling == "first" else -1
    return torch.stack([row[place] for row in rows])


def head_inputs(loaded: LoadedModel, pooled: Tensor) -> Tensor:
    """Return the inputs (rows, k) of the last linear. pooled: (rows, d), from `pooled_states`."""
    family, head = loaded.family, loaded.head
    weight: Any = head.weight
    pooled = pooled.to(weight.dtype)
    pooling = family.classifier.pooling
    return _head_inputs(loaded.model, family.backbone, family.head, pooling, pooled)


def classifier_logits(loaded: LoadedModel, inputs: Tensor) -> Tensor:
    """Return the logits (rows, labels) float32. inputs: from `head_inputs`."""
    logits: Tensor = loaded.head(inputs)
    return logits.float()


def _head_inputs(model: Any, backbone: str, head: str, pooling: Pooling, pooled: Tensor) -> Tensor:
    if pooling == "last":
        return pooled
    return _class_forward(with_module(model, head, nn.Identity()), backbone, pooled[:, None])


def _class_forward(model: Any, backbone: str, hidden: Tensor) -> Tensor:
    """Return the logits of transformers' own forward method for hidden states (rows, tokens, d)."""
    stub = StubBackbone(model.get_submodule(backbone), hidden)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    arguments = {} if hidden.shape[1] > 1 else {"attention_mask": torch.ones_like(ids)}
    logits: Tensor = with_module(model, backbone, stub)(input_ids=ids, **arguments).logits
    return logits


def initial_head(family: Family, config: Any, seed: int) -> Mapping[str, Tensor]:
    """Return name -> initial float32 value of each parameter of a new head, on the CPU.

    Matrices are from a normal distribution with the deviation that the config names, biases are 0
    and the weights of norms 1, as in transformers. seed: of the random values.
    """
    std = float(getattr(config, "initializer_range", 0.02))
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    for name, shape in family.classifier.shapes.items():
        value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        values[name] = value.normal_(std=std, generator=generator) if len(shape) > 1 else value
    return values
