"""A module that computes more than its replacement is refused, and the error names what it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qlora_cli.errors import ModelError
from qlora_cli.models.base_format import BaseFormat
from qlora_cli.models.build import skeleton
from qlora_cli.models.convert import (
    replace_embeddings,
    replace_head,
    replace_linears,
    replace_mlps,
    replace_norms,
)
from qlora_cli.models.sites import find_sites, mlp_paths, norm_paths
from qlora_cli.nn.embedding import FrozenEmbedding
from qlora_cli.nn.mlp import Mlp
from qlora_cli.nn.norm import RmsNorm
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from tests.helpers.families import MODEL_TYPES, small_config

FORMAT = WeightFormat(4, torch.float32, torch.float16)
WIDTH = 64


def model_of(model_type: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """Return (model on meta, family)."""
    return skeleton(small_config(model_type, **settings), torch.float32)


def replaced(model_type: str = "llama", path: str = "", module: nn.Module | None = None) -> Any:
    """Return the converted model; `module` takes the place of `path` before the conversion."""
    model, family = model_of(model_type)
    sites = find_sites(model, family, model.config)
    if module is not None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    replace_linears(model, sites, BaseFormat(FORMAT))
    replace_embeddings(model, family, FORMAT)
    replace_head(model, family.head, FORMAT)
    replace_norms(model, norm_paths(model, family))
    paths = mlp_paths(model, family, family.mlp)
    activation = getattr(model.config, family.mlp.activation)
    replace_mlps(model, paths, family.mlp.projections, activation)
    return model


def with_attribute(module: nn.Module, name: str, value: Any = 2.0) -> nn.Module:
    setattr(module, name, value)
    return module


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


class OnePlusWeight(LlamaRMSNorm):
    """The attributes of Llama's norm and the formula of Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return y * (1 + self.weight)


class ClampedMlp(LlamaMLP):
    """The attributes of Llama's MLP, with a limit on the activation."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act_fn(self.gate_proj(x)).clamp(max=0.5) * self.up_proj(x)
        return self.down_proj(inner)  # type: ignore[no-any-return]


def embedding(kind: type[nn.Embedding] = nn.Embedding, **settings: Any) -> nn.Embedding:
    return kind(300, WIDTH, **settings)


def norm() -> nn.Module:
    return LlamaRMSNorm(WIDTH)


def mlp(kind: type[nn.Module] = LlamaMLP) -> nn.Module:
    return kind(small_config("llama"))


EMBEDDING, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.1.self_attn.q_proj"
NORM, MLP = "model.layers.0.input_layernorm", "model.layers.1.mlp"
REFUSED: list[tuple[str, Callable[[], nn.Module], str]] = [
    (EMBEDDING, lambda: Gemma3TextScaledWordEmbedding(300, WIDTH, 0, 8.0), "embed_scale"),
    (EMBEDDING, lambda: embedding(ScaledEmbedding), "forward method of its own"),
    (EMBEDDING, lambda: embedding(max_norm=1.0), "attribute max_norm"),
    (EMBEDDING, lambda: with_attribute(embedding(), "scale"), "attribute scale"),
    (Q, lambda: ScaledLinear(WIDTH, WIDTH, bias=False), "forward method of its own"),
    (
        Q,
        lambda: with_attribute(nn.Linear(WIDTH, WIDTH), "gain", nn.Parameter(torch.ones(1))),
        "gain",
    ),
    (HEAD, lambda: ScaledLinear(WIDTH, 300, bias=False), "forward method of its own"),
    (HEAD, lambda: with_attribute(nn.Linear(WIDTH, 300), "scale"), "attribute scale"),
    (NORM, lambda: GemmaRMSNorm(WIDTH), "attribute eps"),
    (NORM, lambda: OnePlusWeight(WIDTH), "computes something else"),
    (NORM, lambda: with_attribute(norm(), "bias", nn.Parameter(torch.ones(1))), "parameter bias"),
    (MLP, lambda: mlp(ClampedMlp), "computes something else"),
    (MLP, lambda: with_attribute(mlp(), "limit", 7.0), "attribute limit"),
    (MLP, lambda: with_attribute(mlp(), "router", nn.Linear(WIDTH, 4)), "module router"),
    (MLP, lambda: with_attribute(mlp(), "drop", nn.Dropout(0.1)), "module drop"),
]


@pytest.mark.parametrize(("path", "make", "named"), REFUSED)
def test_a_module_that_computes_more_is_refused(
    path: str, make: Callable[[], nn.Module], named: str
) -> None:
    module = make()
    with pytest.raises(ModelError) as refused:
        replaced(path=path, module=module)
    assert named in str(refused.value)
    assert type(module).__name__ in str(refused.value)
    assert path in str(refused.value)


def test_a_buffer_and_a_hook_are_refused() -> None:
    table = embedding()
    table.register_buffer("offset", torch.ones(1))
    with pytest.raises(ModelError, match="buffer offset"):
        replaced(path=EMBEDDING, module=table)
    table = embedding()
    table.register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(ModelError, match="hook"):
        replaced(path=EMBEDDING, module=table)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_supported_architecture_is_covered(model_type: str) -> None:
    state = torch.get_rng_state()
    model = replaced(model_type)
    assert torch.equal(torch.get_rng_state(), state), "the checks draw no random numbers"
    kinds = {type(module) for module in model.modules()}
    assert {QuantLinear, FrozenEmbedding, Mlp} <= kinds
    assert RmsNorm in kinds or model_type == "gpt2"


@pytest.mark.parametrize(
    ("key", "value"),
    [("final_logit_softcapping", 30.0), ("logit_scale", 0.0625), ("logits_scaling", 8.0)],
)
def test_a_model_that_changes_its_logits_is_refused(key: str, value: float) -> None:
    with pytest.raises(ModelError, match=f"LlamaConfig sets {key} to {value}"):
        model_of(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1)],
)
def test_neutral_logit_settings_are_accepted(key: str, value: float | None) -> None:
    model_of(**{key: value})
