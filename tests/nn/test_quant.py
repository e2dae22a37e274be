"""The packed linear equals bitsandbytes bit for bit, and its gradients survive eval()."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes.functional as reference
import pytest
import torch
from torch import Tensor

from qlora_cli.memory.tracker import KernelRules, StorageTracker
from qlora_cli.nn import packing, quant
from qlora_cli.nn.packing import BLOCK_SIZE_4BIT, WeightFormat
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.plan.recording import Recording
from tests.helpers.families import MODEL_TYPES
from tests.helpers.quantized import draw, packed
from tests.helpers.runs import build_base, logits, make_base, make_recipe, make_rows

SIZES = [(64, 64), (128, 172), (172, 128), (30, 18), (43, 172)]
"""(out, in): full blocks, blocks across rows, a partial last block, an odd number of rows."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_4_bit_equals_bitsandbytes_bit_for_bit(
    size: tuple[int, int], double_quant: bool, quant_type: str, file_dtype: torch.dtype
) -> None:
    weight = draw(*size, dtype=file_dtype)
    layer = packed(weight, quant_type=quant_type, double_quant=double_quant)
    wanted, state = reference.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type
    )
    state.dtype = torch.float32
    assert torch.equal(layer.weight.flatten(), wanted.flatten())
    assert torch.equal(layer.dequantize(), reference.dequantize_4bit(wanted, state))


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize(("bits", "inputs"), [(4, 172), (4, 35), (8, 35), (16, 35)])
def test_products_in_pieces_equal_products_with_the_whole_weight(
    bits: int, inputs: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = packed(draw(150, inputs), bits)
    x, grad = draw(num_tokens, inputs), draw(num_tokens, 150)
    wanted = layer.product(x), layer.grad_input(grad)
    assert layer.piece_bytes == 150 * inputs * 4
    monkeypatch.setattr(quant, "PIECE_ELEMENTS", 64 * inputs)
    assert layer.piece_bytes == 64 * inputs * 4
    assert len(list(layer._dequantized_pieces())) == 3
    for found, whole in zip((layer.product(x), layer.grad_input(grad)), wanted, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_output_of_a_product_is_allocated_before_the_large_temporaries(bits: int) -> None:
    """Else the output takes a part of a freed place, and the next temporary needs a new one."""
    layer, x = packed(draw(200, 172), bits), draw(11, 172)
    recording = Recording()
    with StorageTracker(recording, KernelRules()) as tracker:
        tracker.tag([layer.weight], "base")
        y = layer.product(x)
    events = [event for segment in recording.segments for event in segment.events]
    freed = {event.storage for event in events if event.kind == "free"}
    allocated = [event for event in events if event.kind == "allocate" and event.category != "base"]
    (kept,) = [event for event in allocated if event.storage not in freed]
    assert kept.num_bytes == y.nbytes
    assert kept.category != "temporary", "the ledger counts it as an activation"
    large = [event for event in allocated if event.num_bytes >= y.nbytes]
    assert large[0] == kept
    assert len(large) > 1, "there are large temporaries"


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_in_pieces_changes_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(43, 172)
    whole = packed(weight, bits)
    monkeypatch.setattr(packing, "PACK_ELEMENTS", 512)
    pieces = packed(weight, bits)
    assert torch.equal(whole.weight, pieces.weight)
    assert torch.equal(whole.dequantize(), pieces.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_transposed_weight_is_packed_as_it_is_read(bits: int) -> None:
    """GPT-2's file stores (in, out); a view of it must not be packed in the file's order."""
    weight = draw(64, 96)
    assert torch.equal(
        packed(weight.t(), bits).dequantize(), packed(weight.t().contiguous(), bits).dequantize()
    )


@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_product_and_gradient_use_the_dequantized_weight(bits: int, compute: torch.dtype) -> None:
    layer = packed(draw(48, 172), bits, compute)
    x = draw(9, 172, seed=1, dtype=compute).requires_grad_()
    grad = draw(9, 48, seed=2, dtype=compute)
    y = layer(x)
    y.backward(grad)
    weight = layer.dequantize()
    assert weight.dtype == y.dtype == compute
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ weight)
    if bits == 8:
        # 8 bit also rounds the input, by up to half a step (0.29 steps root mean square).
        step = x.detach().float().abs().amax(dim=1, keepdim=True) / 127
        bound = 6 * step * 0.29 * weight.float().norm(dim=1)
        assert (
            (y.float() - x.float() @ weight.float().t()).abs()
            < bound + 0.1 * (compute.itemsize == 2)
        ).all()
    else:
        assert torch.equal(y, x @ weight.t())


def test_16_bit_keeps_the_weight_of_the_file() -> None:
    weight = draw(40, 24, dtype=torch.float16)
    assert torch.equal(packed(weight, 16).dequantize(), weight.float())


@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_product_of_a_token_uses_the_dequantized_weight(
    bias: bool, double_quant: bool, compute: torch.dtype
) -> None:
    layer = packed(draw(48, 192), 4, compute, double_quant=double_quant)
    if bias:
        layer.bias = torch.nn.Parameter(draw(48, seed=5, dtype=compute), requires_grad=False)
    token, tokens = draw(1, 192, seed=1, dtype=compute), draw(3, 192, seed=2, dtype=compute)
    wanted = [layer.product(x) for x in (token, tokens)]
    weight = layer.dequantize()
    layer.fuse_token_product()
    torch.testing.assert_close(layer.product(token), wanted[0])
    assert torch.equal(layer.product(tokens), wanted[1])
    layer.weight.data[:, 0] ^= 0x10
    assert not torch.equal(layer.dequantize(), weight)
    assert not torch.allclose(layer.product(token), wanted[0], atol=0.1), "it reads packed weights"


def test_rows_of_partial_blocks_have_no_fused_product() -> None:
    layer, token = packed(draw(48, 172), 4), draw(1, 172, seed=1)
    layer.fuse_token_product()
    assert torch.equal(layer.product(token), token @ layer.dequantize().t())


def int8_reference(layer: QuantLinear, x: Tensor) -> Tensor:
    """Return LLM.int8()'s equations 3 to 8, computed in float64."""
    assert layer.scale is not None
    outliers = (x.abs() > layer.weight_format.threshold).any(dim=0)
    weight = layer.weight.double() * layer.scale.double()[:, None]
    inliers = x.double() * ~outliers
    scale = inliers.abs().amax(dim=1, keepdim=True) / 127
    codes = torch.where(scale > 0, inliers / scale, 0).round()
    return (codes * scale) @ weight.t() + (x.double() * outliers) @ weight.t()


def test_8_bit_equals_llm_int8() -> None:
    weight, x = draw(48, 172), draw(16, 172, seed=1)
    x[3, 7], x[5, 90] = 9.0, -30.0
    layer = packed(weight, 8)
    difference = (layer.product(x) - int8_reference(layer, x)).abs().max()
    # A value in the middle between two codes may round either way: one step of one input.
    assert difference < 1e-4


def test_8_bit_codes_and_scales_equal_bitsandbytes() -> None:
    weight = draw(48, 172, dtype=torch.float16)
    layer = packed(weight, 8)
    codes, largest, _ = reference.int8_vectorwise_quant(weight.clone(), threshold=0.0)
    assert layer.scale is not None
    torch.testing.assert_close(layer.scale.detach() * 127, largest)
    # bitsandbytes multiplies by 127 / largest, this package divides by largest / 127: a value in
    # the middle between two codes may round either way.
    difference = (layer.weight.int() - codes.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-3


def test_8_bit_agrees_with_the_mixed_product_of_bitsandbytes() -> None:
    """Linear8bitLt is no reference, because it does not quantize its input on a CPU."""
    weight, x = draw(48, 192, dtype=torch.float16), draw(16, 192, seed=1, dtype=torch.float16)
    x[3, 7], x[5, 90] = 9.0, -30.0
    layer = packed(weight, 8, torch.float16)
    codes, largest, columns = reference.int8_vectorwise_quant(x.clone(), threshold=6.0)
    assert columns is not None
    assert columns.tolist() == [7, 90]
    assert layer.scale is not None
    wanted, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, codes, layer.weight.detach(), largest, layer.scale.detach() * 127, columns
    )
    difference = layer.product(x).float() - wanted.float()
    # It rounds to float16 at other places, and inputs may be in the middle between two codes.
    assert difference.norm() / wanted.float().norm() < 2e-3


def test_outlier_columns_are_exact() -> None:
    """Inputs that are all outliers are multiplied by the dequantized weight."""
    layer = packed(draw(48, 172), 8)
    x = torch.zeros(4, 172)
    x[:, [3, 100]] = torch.tensor([[50.0, -7.5], [8.0, 9.0], [-1e4, 6.5], [7.0, 7.0]])
    wanted = x @ layer.dequantize().t()
    torch.testing.assert_close(layer.product(x), wanted, rtol=1e-6, atol=1e-6)
    without = packed(draw(48, 172), 8, threshold=0.0)
    assert (without.product(x) - wanted).abs().max() > 1e-3, "without outliers there is an error"


def test_many_outlier_columns_use_the_dequantized_weight() -> None:
    layer = packed(draw(48, 172), 8)
    x = 100 * draw(6, 172, seed=1)
    assert torch.equal(layer.product(x), x @ layer.dequantize().t())


@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_zero_rows_stay_zero(bits: int, compute: torch.dtype) -> None:
    weight, x = draw(64, 64), draw(5, 64, seed=1, dtype=compute)
    weight[[0, 17]] = 0
    x[2] = 0
    layer = (
        packed(weight, bits, compute, double_quant=False)
        if bits == 4
        else packed(weight, bits, compute)
    )
    y = layer.product(x)
    assert torch.isfinite(y).all()
    assert not y[:, [0, 17]].any()
    assert not y[2].any()


def test_an_all_zero_weight_is_finite() -> None:
    for bits in (4, 8, 16):
        layer = packed(torch.zeros(64, 64), bits)
        assert not layer.product(draw(3, 64)).any()


@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_family_computes_in_every_dtype(
    tmp_path: Path, family: str, bits: int, compute: str
) -> None:
    """Also families with biases: torch refuses a float32 bias in a 16-bit product."""
    base = make_base(tmp_path / "base", family, spread=0.1)
    rows = make_rows(tmp_path / "rows.jsonl")
    loaded = build_base(make_recipe(base, rows, base={"bits": bits, "compute_dtype": compute}))
    assert torch.isfinite(logits(loaded, torch.arange(3, 20)[None])).all()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gradients_are_unchanged_after_eval_mode(bits: int) -> None:
    """On some CPUs bitsandbytes' own layer repacks its weight in eval mode."""
    layer = packed(draw(64, 64, dtype=torch.bfloat16), bits, torch.bfloat16)
    bytes_before = layer.weight.detach().clone()

    def gradient() -> Tensor:
        x = draw(7, 64, seed=1, dtype=torch.bfloat16).requires_grad_()
        layer.train()(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    before = gradient()
    with torch.no_grad():
        layer.eval()(draw(1, 64, dtype=torch.bfloat16))
    assert torch.equal(gradient(), before)
    assert torch.equal(layer.weight, bytes_before)


def test_nothing_is_saved_for_backward() -> None:
    """A frozen product needs no input in its backward pass; saving it would defeat checkpoints."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for bits in (4, 8, 16):
        x = draw(7, 64).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            packed(draw(64, 64), bits)(x)
    assert not saved


def test_packed_weights_are_frozen_parameters() -> None:
    layer = packed(draw(64, 64))
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"weight", "scale", "scale_of_scale", "offset_of_scale"}
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert not dict(layer.named_buffers())
    # About 4.127 bits per weight (QLoRA, section 3): 4096 weights have few scales.
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.dequantize(), layer.dequantize())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [32, 96, 128, 160])
def test_rows_need_not_be_whole_blocks(width: int, quant_type: str) -> None:
    """No value is farther from the weight than the largest gap of the codes, in its own block."""
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    weight_format = WeightFormat(4, torch.float32, torch.float16, quant_type, double_quant=False)
    layer = QuantLinear(width, 24, False, weight_format)
    layer.pack(weight)
    error = (layer.dequantize() - weight).reshape(-1, BLOCK_SIZE_4BIT).abs()
    scale = weight.reshape(-1, BLOCK_SIZE_4BIT).abs().amax(dim=1, keepdim=True)
    assert (error <= 0.17 * scale).all()
