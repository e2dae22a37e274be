"""LoRA on a model: only A and B train, the base never changes, and targets select the linears."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.data.collate import collate
from qlora_cli.data.encode import Example
from qlora_cli.errors import ProblemsError
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.train.optimizer import make_optimizer
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import (
    CPU,
    build_base,
    logits,
    make_base,
    make_recipe,
    make_rows,
    randomize_b,
)

IDS = torch.arange(5, 29)[None]


def example(start: int, length: int = 14) -> Example:
    ids = [3 + (start + 7 * i) % 250 for i in range(length)]
    return Example(ids=ids, labels=list(ids), origin=f"row {start}")


def frozen_hash(loaded: LoadedModel) -> str:
    """Return a hash of every byte that is not trained, buffers included."""
    digest = hashlib.sha256()
    tensors = [*loaded.model.named_parameters(), *loaded.model.named_buffers()]
    for name, tensor in tensors:
        if not tensor.requires_grad:
            digest.update(name.encode())
            digest.update(
                tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl")
    return {family: make_base(folder / family, family, spread=0.1) for family in MODEL_TYPES}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(
    bases: dict[str, Path], family: str, bits: int
) -> None:
    """With B = 0 the model equals the base. Only A and B train; steps change no other byte."""
    recipe = make_recipe(
        bases[family], bases[family].parent / "rows.jsonl", base={"bits": bits}, train={"lr": 1e-2}
    )
    loaded = build_base(recipe)
    with_adapter = logits(loaded, IDS)
    adapters = dict(adapted_layers(loaded.model))
    for path, layer in adapters.items():
        loaded.model.set_submodule(path, layer.base)
    assert torch.equal(logits(loaded, IDS), with_adapter)
    for path, layer in adapters.items():
        loaded.model.set_submodule(path, layer)

    trained = loaded.trainable()
    assert trained
    assert all(".lora_a." in name or ".lora_b." in name for name in trained)
    before = frozen_hash(loaded)
    loaded.model.train()
    optimizer = make_optimizer(recipe.train, trained.values(), CPU)
    optimizer.param_groups[0]["lr"] = 1e-2
    for step in range(3):
        CAUSAL.loss(loaded, collate([example(step), example(step + 20)]), CPU, 0.1).backward()
        assert all(p.grad is not None for p in trained.values())
        assert all(p.grad is None for p in loaded.model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert frozen_hash(loaded) == before
    assert not torch.equal(logits(loaded, IDS), with_adapter), "three steps must change the output"
    next(p for p in loaded.model.parameters() if not p.requires_grad).data.flatten()[0] += 1
    assert frozen_hash(loaded) != before, "the hash must detect a single byte"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_unchanged_after_an_evaluation(bases: dict[str, Path], family: str) -> None:
    """In bfloat16, in which bitsandbytes' own layer repacks its weight in eval mode."""
    recipe = make_recipe(
        bases[family], bases[family].parent / "rows.jsonl", base={"compute_dtype": "bfloat16"}
    )
    loaded = build_base(recipe)
    randomize_b(loaded)

    def step() -> dict[str, Tensor]:
        loaded.model.train()
        CAUSAL.loss(loaded, collate([example(1)]), CPU, 1.0).backward()
        found = {
            name: p.grad.clone() for name, p in loaded.trainable().items() if p.grad is not None
        }
        loaded.model.zero_grad()
        return found

    before = step()
    loaded.model.eval()
    logits(loaded, IDS)
    after = step()
    assert before.keys() == after.keys() == loaded.trainable().keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "targets", "wanted"),
    [
        ("llama", ["q", "v"], {"self_attn.q_proj": {"q"}, "self_attn.v_proj": {"v"}}),
        ("llama", ["model.layers.1.mlp.up_proj"], {"mlp.up_proj": {"up"}}),
        ("gpt2", ["q", "v"], {"attn.c_attn": {"q", "v"}}),
        ("gpt2", ["transformer.h.0.attn.c_attn"], {"attn.c_attn": {"q", "k", "v"}}),
        ("gpt2", ["down"], {"mlp.c_proj": {"down"}}),
    ],
)
def test_targets_by_role_and_by_path(
    bases: dict[str, Path], family: str, targets: list[str], wanted: dict[str, set[str]]
) -> None:
    loaded = build_base(
        make_recipe(
            bases[family], bases[family].parent / "rows.jsonl", adapter={"targets": targets}
        )
    )
    found = {path: set(layer.lora_slices) for path, layer in adapted_layers(loaded.model)}
    assert {path.split(".", 3)[-1]: roles for path, roles in found.items()} == wanted
    blocks = {path.split(".")[2] for path in found}
    assert len(blocks) == (1 if "." in targets[0] else 2)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_target_all_adapts_every_linear_of_the_blocks(bases: dict[str, Path], family: str) -> None:
    loaded = build_base(make_recipe(bases[family], bases[family].parent / "rows.jsonl"))
    left = [
        path
        for path, module in loaded.model.named_modules()
        if isinstance(module, QuantLinear)
        and not path.endswith(".base")
        and path != loaded.family.head
    ]
    assert not left
    assert not [m for m in loaded.model.modules() if isinstance(m, nn.Linear)]


def test_every_unknown_target_is_named_at_once(bases: dict[str, Path]) -> None:
    recipe = make_recipe(
        bases["gpt2"],
        bases["gpt2"].parent / "rows.jsonl",
        adapter={"targets": ["q", "gate", "nope"]},
    )
    with pytest.raises(ProblemsError) as caught:
        build_base(recipe)
    text = str(caught.value)
    assert len(caught.value.problems) == 2
    assert "'gate'" in text
    assert "'nope'" in text
    assert "q, k, v, o, up, down" in text


def test_fused_gpt2_adapts_q_and_v_and_not_k(bases: dict[str, Path]) -> None:
    recipe = make_recipe(
        bases["gpt2"], bases["gpt2"].parent / "rows.jsonl", adapter={"targets": ["q", "v"]}
    )
    loaded = build_base(recipe)
    randomize_b(loaded)
    for _, layer in adapted_layers(loaded.model):
        delta = layer.delta()
        assert [bool(part.any()) for part in delta.split(64)] == [True, False, True]
