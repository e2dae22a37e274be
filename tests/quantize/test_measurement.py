"""The measured and the estimated cost of quantization are those of transformers' own model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_cli.data.encode import Example
from qlora_cli.events import Silent
from qlora_cli.export.compare.logit_comparison import ComparedLogits
from qlora_cli.files.locate import read_config
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.proof.small_config import small_config as proof_config
from qlora_cli.quantize import measurement, search
from qlora_cli.quantize.gradients import divergence_gradient
from qlora_cli.quantize.measurement import MeasuredBase, measure_mix, measure_reference
from qlora_cli.quantize.mix import LinearSize
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.families import as_in_file
from tests.helpers.measured_base import FORMAT, ROWS, measured_base
from tests.helpers.runs import CPU


def log_probabilities(base: MeasuredBase, changed: Mapping[str, Tensor]) -> Tensor:
    """Return log p (positions, V) of transformers' model. changed: path -> weight (out, in)."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    family = base.config.model_type
    with torch.no_grad():
        for path, weight in changed.items():
            model.get_submodule(path).weight.copy_(as_in_file(family, weight))
        return model(torch.tensor(ROWS)).logits[:, :-1].flatten(0, 1).log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def weights(base: MeasuredBase) -> dict[str, Tensor]:
    """Return path -> original weight (out, in) of each linear."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    found = {}
    for site in base.sites:
        weight = model.get_submodule(site.path).weight.detach()
        found[site.path] = as_in_file(base.config.model_type, weight).contiguous()
    return found


def in_bits(weight: Tensor, bits: int) -> Tensor:
    layer = QuantLinear(weight.shape[1], weight.shape[0], False, replace(FORMAT, bits=bits))
    layer.pack(weight)
    return layer.dequantize()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_measured_kl_is_that_of_the_dequantized_weights(family: str, tmp_path: Path) -> None:
    base = measured_base(tmp_path, family)
    reference, _ = measure_reference(base, Silent())
    original = weights(base)
    mix = {path: 16 if number % 3 else 4 for number, path in enumerate(original)}
    changed = {path: in_bits(w, mix[path]) for path, w in original.items()}
    expected = divergence(log_probabilities(base, {}), log_probabilities(base, changed))
    measured = measure_mix(base, mix, reference, Silent())
    assert measured.kl == pytest.approx(expected, rel=1e-3)
    forward = measurement.compare_format(base, base.format_of(mix), reference)
    assert forward.mean_kl == pytest.approx(expected, rel=1e-3)
    assert forward.mean_kl > 1e-4
    assert {p: set(c) for p, c in measured.changes.items()} == {
        path: {8, 16} for path, bits in mix.items() if bits == 4
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_order_change_is_the_derivative_of_the_kl(family: str, tmp_path: Path) -> None:
    base = measured_base(tmp_path, family)
    reference, _ = measure_reference(base, Silent())
    original = weights(base)
    quantized = {path: in_bits(w, 4) for path, w in original.items()}
    changes = measure_mix(base, {}, reference, Silent()).changes
    p = log_probabilities(base, {})
    step = 1e-2
    for path in list(original)[::3]:
        between = [
            quantized | {path: torch.lerp(quantized[path], original[path], weight)}
            for weight in (-step, step)
        ]
        low, high = (divergence(p, log_probabilities(base, changed)) for changed in between)
        assert changes[path][16] == pytest.approx((high - low) / (2 * step), rel=0.05, abs=1e-5)


@pytest.mark.slow
def test_the_estimated_cost_of_a_linear_is_its_kl_alone(tmp_path: Path) -> None:
    base = measured_base(tmp_path)
    _, alone = measure_reference(base, Silent(), num_draws=40)
    p = log_probabilities(base, {})
    for path, weight in list(weights(base).items())[::2]:
        exact = divergence(p, log_probabilities(base, {path: in_bits(weight, 4)}))
        # 240 scores: a standard deviation of 9 %. The rest is the third order.
        assert alone[path][4] == pytest.approx(exact, rel=0.3), path
        assert alone[path][8] < alone[path][4] / 10


def test_the_gradient_of_the_divergence_is_autograds(tmp_path: Path) -> None:
    base = measured_base(tmp_path)
    logits, _ = measure_reference(base, Silent())
    hidden = logits.hidden_states + 0.1 * torch.randn_like(logits.hidden_states)
    other = ComparedLogits(hidden.requires_grad_(), logits.head, logits.targets)
    head = logits.head.rows(slice(0, logits.head.vocab_size))
    p, q = (h @ head.t() for h in (logits.hidden_states, hidden))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    (expected,) = torch.autograd.grad((p.exp() * (p - q)).sum(), hidden)
    with torch.no_grad():
        torch.testing.assert_close(divergence_gradient(other, logits), expected)


def sizes_of(base: MeasuredBase) -> list[LinearSize]:
    numbers = {site.path: site.in_features * site.out_features for site in base.sites}
    return [LinearSize(p, {4: n // 2, 8: n, 16: 2 * n}) for p, n in numbers.items()]


def plain_bytes(sizes: list[LinearSize]) -> int:
    return sum(size.num_bytes[4] for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma2", "falcon_mamba", "gpt_neox"])
def test_derived_families_are_measured(model_type: str, tmp_path: Path) -> None:
    config = proof_config(AutoConfig.for_model(model_type))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(torch.float16).save_pretrained(tmp_path)
    rows = [Example(row, [IGNORE_INDEX, *row[1:]], "") for row in ([5, 9, 7, 11, 3], [8, 2, 6])]
    config = read_config(tmp_path / "config.json")
    base = MeasuredBase(CAUSAL, tmp_path, config, FORMAT, rows, CPU)
    reference, alone = measure_reference(base, Silent())
    assert set(alone) == {site.path for site in base.sites} != set()
    assert all(cost[4] > cost[8] for cost in alone.values())
    mix = measure_mix(base, {}, reference, Silent())
    forward = measurement.compare_format(base, base.format_of({}), reference)
    assert mix.kl == pytest.approx(forward.mean_kl, rel=1e-3)
    exact = {site.path: 16 for site in base.sites}
    assert measurement.compare_format(base, base.format_of(exact), reference).mean_kl < mix.kl / 10


@pytest.mark.slow
def test_a_search_spends_its_budget_where_the_kl_is(tmp_path: Path) -> None:
    base = measured_base(tmp_path, num_hidden_layers=4)
    sizes = sizes_of(base)
    budget = plain_bytes(sizes) // 5
    found = search.find_mix(base, sizes, budget, None, Silent())
    last = found.steps[-1]
    assert last.num_bytes <= plain_bytes(sizes) + budget
    assert last.predicted == pytest.approx(last.measured, rel=0.3)
    # 20 % of the bytes recover more than their share.
    assert last.measured < 0.75 * found.plain.measured
    assert found.kl_8bit < 0.1 * found.plain.measured


@pytest.mark.slow
def test_a_search_stops_at_the_wanted_kl(tmp_path: Path) -> None:
    base = measured_base(tmp_path)
    sizes = sizes_of(base)
    plain = search.find_mix(base, sizes, 0, None, Silent()).plain.measured
    found = search.find_mix(base, sizes, None, 0.4 * plain, Silent())
    assert found.steps[-1].measured <= 0.4 * plain < found.steps[-2].measured
    assert found.steps[-1].num_bytes < sum(size.num_bytes[8] for size in sizes)
    done = search.find_mix(base, sizes, None, 2 * plain, Silent())
    assert len(done.steps) == 1


@pytest.mark.slow
def test_a_wrong_estimate_shows_in_the_measured_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scores of the wrong sign the search believes to gain where it does not."""
    base = measured_base(tmp_path, num_hidden_layers=4)
    sizes = sizes_of(base)
    budget = plain_bytes(sizes) // 5
    honest = search.find_mix(base, sizes, budget, None, Silent()).steps[-1]
    add = measurement.Scores.add
    monkeypatch.setattr(
        measurement.Scores, "add", lambda s, path, bits, tokens: add(s, path, bits, -tokens)
    )
    wrong = search.find_mix(base, sizes, budget, None, Silent()).steps[-1]
    assert wrong.measured > 1.1 * honest.measured
