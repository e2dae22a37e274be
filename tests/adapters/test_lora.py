"""LoRA's product equals that of plain modules; only A and B train and the base never changes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional

from qlora_cli.adapters.lora import LoraLinear, LoraSettings, adapted_layers
from qlora_cli.data.collate import collate
from qlora_cli.data.encode import Example
from qlora_cli.errors import ProblemsError
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.lora_matmul import draw_seed
from qlora_cli.nn.quant import QuantLinear, WeightFormat
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
PLAIN = {"q": slice(0, 48)}
FUSED = {"q": slice(0, 16), "v": slice(32, 48)}
"""Slices of a fused q/k/v projection with 48 rows: k in the middle has no adapter."""


def adapted(
    parts: Mapping[str, slice],
    *,
    bits: int = 4,
    compute: torch.dtype = torch.float64,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    rslora: bool = False,
) -> LoraLinear:
    """Return an adapted linear (48, 64) with values in A and B."""
    generator = torch.Generator().manual_seed(1)
    base = QuantLinear(64, 48, False, WeightFormat(bits, compute, compute))
    base.pack(torch.randn(48, 64, generator=generator).to(compute if bits == 16 else torch.float32))
    layer = LoraLinear(base, parts, LoraSettings(4, 6.0, dropout, dtype, rslora))
    layer.initialize(CPU, generator)
    for b in layer.lora_b.values():
        b.data.copy_(torch.randn(b.shape, generator=generator))
    return layer


def composed(layer: LoraLinear, x: Tensor, dropped: Tensor) -> Tensor:
    """Return the output of the layer, computed with plain differentiable operations."""
    y = x @ layer.base.dequantize().t()
    for role, rows in layer.lora_slices.items():
        part = dropped @ layer.lora_a[role].t() @ layer.lora_b[role].t()
        y = y + functional.pad(part, (rows.start, y.shape[1] - rows.stop)) * layer.settings.scaling
    return y


def gradients(y: Tensor, layer: LoraLinear, x: Tensor) -> list[Tensor]:
    inputs = [x, *layer.lora_a.values(), *layer.lora_b.values()]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weights).sum() + y.square().sum(), inputs))


def keep_mask(x: Tensor, dropout: float) -> Tensor:
    """Return the mask of kept values that the next call of a layer with dropout uses."""
    generator = torch.Generator().manual_seed(draw_seed())
    return ~torch.empty(x.shape, dtype=torch.bool).bernoulli_(dropout, generator=generator)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("parts", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_equal_plain_modules_in_float64(
    parts: Mapping[str, slice], dropout: float, rslora: bool
) -> None:
    layer = adapted(parts, bits=16, dropout=dropout, rslora=rslora)
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(11)
    ours = layer(x)
    torch.manual_seed(11)
    flat = x.reshape(-1, 64)
    dropped = flat * keep_mask(flat, dropout) / (1 - dropout) if dropout else flat
    wanted = composed(layer, flat, dropped).view(3, 5, 48)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    for own, other in zip(gradients(ours, layer, x), gradients(wanted, layer, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gradients_on_a_packed_base(bits: int) -> None:
    layer = adapted(FUSED, bits=bits, compute=torch.float32, dtype=torch.float32)
    x = torch.randn(7, 64, requires_grad=True)
    ours, wanted = layer(x), composed(layer, x, x)
    if bits == 8:
        # 8 bit rounds its input; with equal outputs both get the same gradient.
        wanted = wanted + (ours - wanted).detach()
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    for own, other in zip(gradients(ours, layer, x), gradients(wanted, layer, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_lora_passes_gradcheck() -> None:
    layer = adapted(FUSED, bits=16)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    factors = [*layer.lora_a.values(), *layer.lora_b.values()]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *factors), fast_mode=True)


def test_gradcheck_detects_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted(PLAIN, bits=16)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(
        QuantLinear, "grad_input", lambda self, grad: 1.01 * grad @ self.dequantize()
    )
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_dropout_draws_a_new_mask_in_each_call_and_only_in_training() -> None:
    layer = adapted(PLAIN, bits=16, dropout=0.3)
    layer.base.weight.data.zero_()
    eye = torch.eye(64, dtype=torch.float64)
    torch.manual_seed(0)
    outputs = [layer(eye) for _ in range(40)]
    assert not torch.equal(outputs[0], outputs[1])
    zero = torch.stack([(one == 0).all(dim=1) for one in outputs]).double()
    # Row i of A^T B^T is zero if entry i of the unit vector is dropped: 2560 draws.
    assert zero.mean().item() == pytest.approx(0.3, abs=0.03)
    layer.eval()
    torch.testing.assert_close(layer(eye), layer.delta().t().double(), rtol=1e-5, atol=1e-5)
    there = outputs[0][~zero[0].bool()]
    torch.testing.assert_close(there, layer(eye)[~zero[0].bool()] / 0.7)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_only_x_and_x_a_are_saved_for_backward(dropout: float) -> None:
    layer = adapted(FUSED, dropout=dropout)
    x = torch.randn(9, 64, dtype=torch.float64, requires_grad=True)
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    factors = [tuple(factor.shape) for role in FUSED for factor in layer._factors(role)]
    assert sorted(shapes) == sorted([(9, 64), (9, 4), (9, 4), *factors])


def test_delta_is_scaling_b_a() -> None:
    for rslora, scaling in ((False, 6.0 / 4), (True, 6.0 / math.sqrt(4))):
        layer = adapted(FUSED, rslora=rslora, dtype=torch.float32)
        delta = layer.delta()
        for role, rows in FUSED.items():
            wanted = scaling * layer.lora_b[role] @ layer.lora_a[role]
            torch.testing.assert_close(delta[rows], wanted.detach(), rtol=1e-6, atol=1e-6)
        assert not delta[16:32].any(), "k has no adapter"


def test_float16_adapters_are_the_float32_ones_rounded() -> None:
    exact = adapted(FUSED, compute=torch.float32, dtype=torch.float32)
    half = adapted(FUSED, compute=torch.float32, dtype=torch.float16)
    for role in FUSED:
        assert half.lora_a[role].dtype == torch.float16
        exact.lora_a[role].data.copy_(half.lora_a[role])
        exact.lora_b[role].data.copy_(half.lora_b[role])
    x = torch.randn(5, 64, requires_grad=True)
    torch.testing.assert_close(half(x), exact(x))
    for own, other in zip(gradients(half(x), half, x), gradients(exact(x), exact, x), strict=True):
        torch.testing.assert_close(own.float(), other, rtol=1e-3, atol=1e-3)


def test_a_seed_gives_a_and_a_is_gaussian() -> None:
    settings = LoraSettings(64, 8.0, 0.0, torch.float32, False)
    layer = LoraLinear(
        QuantLinear(1024, 8, False, WeightFormat(4, torch.float32, torch.float16)),
        {"q": slice(0, 8)},
        settings,
    )
    drawn = []
    for _ in range(2):
        layer.initialize(CPU, torch.Generator().manual_seed(3))
        drawn.append(layer.lora_a["q"].detach())
    assert torch.equal(*drawn)
    assert not layer.lora_b["q"].any()
    assert drawn[0].std() == pytest.approx(1024**-0.5, rel=0.02)
    # The fourth moment is 3 times the squared variance (Gaussian) or 1.8 times (uniform).
    assert (drawn[0] ** 4).mean() / drawn[0].var() ** 2 == pytest.approx(3.0, rel=0.05)


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
