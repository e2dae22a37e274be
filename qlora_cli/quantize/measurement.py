"""Measures what quantization of a base costs: the KL of the model, and the part of each linear.

All figures are nats per predicted token, KL(16 bit || quantized), computed in float32 so that they
show the rounding of the weights and not that of the arithmetic. No complete copy of the model in 16
bit is in memory: embeddings and norms are, and the linears one at a time.

Two passes forward and backward are used:

- On the 16-bit model, with labels y drawn from its own predictions p and the gradient of log p(y):
  half the mean square of a row's score is, to second order, the KL if this linear alone is
  quantized (the Fisher information along the change of its output).
- On a quantized model, with the gradient of KL(16 bit || quantized) itself: the score of a linear
  is, to first order, the change of this KL if the linear gets more bits. It contains how the
  errors of all linears act together, which the first pass does not.

The KL itself of each linear would need a forward pass per linear and format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.data.encode import Example
from qlora_cli.events import Observer
from qlora_cli.export.compare.comparison_models import (
    ComparisonModel,
    comparison_model,
    trained_on_meta,
)
from qlora_cli.export.compare.logit_comparison import ComparedLogits, Comparison, compare
from qlora_cli.files.source import FolderSource
from qlora_cli.memory.device import profile_of
from qlora_cli.models.base_format import BaseFormat
from qlora_cli.models.build import skeleton
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.device import DevicePlacement
from qlora_cli.models.placement.streamed import StreamedPlacement
from qlora_cli.models.sites import find_sites
from qlora_cli.nn.activation_policy import ActivationPolicy, Recomputation
from qlora_cli.nn.attention import kernel_for
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.quantize.gradients import divergence_gradient, sampled_gradient
from qlora_cli.quantize.measured_linear import MeasuredLinear, Scores
from qlora_cli.tasks.backbone import hidden_states, targets_of
from qlora_cli.tasks.task import Task

ALL_BITS = (4, 8, 16)
NUM_DRAWS = 1
"""Passes on the 16-bit model, each with other labels. With 64 rows, one draw knows the cost of each
linear alone to about 18 %."""

Divergences = Mapping[str, Mapping[int, float]]
"""Path of a linear -> bits -> nats per predicted token."""


@dataclass(frozen=True)
class MeasuredBase:
    """A base and the rows that it is measured on.

    config: transformers' config. default: format of the linears in training; its bits are not used.
    importance: as of `BaseFormat`.
    """

    task: Task
    folder: Path
    config: Any
    default: WeightFormat
    rows: Sequence[Example]
    device: torch.device
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def sites(self) -> list[Site]:
        """Return every linear that can be quantized. Experts in stacks are not among them."""
        model, family = skeleton(self.config, torch.float32, self.task.model_class)
        return find_sites(model, family, self.config)

    @property
    def num_targets(self) -> int:
        """Return the number of predicted tokens."""
        return sum(row.num_targets for row in self.rows)

    def format_of(self, bits: Mapping[str, int], default: int = 4) -> BaseFormat:
        """Return the format of a mix, computing in float32. bits: by path of the linear."""
        plain = replace(self.default, bits=default, compute=torch.float32)
        return BaseFormat(plain, tuple(bits.items()), self.importance)


@dataclass(frozen=True)
class Measured:
    """A mix of bits, and what it costs.

    comparison: with the 16-bit model. changes: estimated change of the KL if one linear alone gets
    more bits, to first order.
    """

    comparison: Comparison
    changes: Divergences

    @property
    def kl(self) -> float:
        """Return KL(16 bit || mix)."""
        return self.comparison.mean_kl


def measure_reference(
    base: MeasuredBase, observer: Observer, num_draws: int = NUM_DRAWS
) -> tuple[ComparedLogits, Divergences]:
    """Return the predictions of the 16-bit model, and the estimated KL of each linear alone."""
    model, scores = _measured_model(base, base.format_of({}, 16), lambda _: (4, 8))
    _show_progress(scores, num_draws * len(base.sites), "measure each linear", observer)
    for draw in range(num_draws):
        logits = _run(base, model, scores, partial(sampled_gradient, seed=draw))
    number = 2 * num_draws * base.num_targets
    found = {
        path: {bits: sum(s**2 for s in rows) / number for bits, rows in by_bits.items()}
        for path, by_bits in scores.found.items()
    }
    return logits, found


def measure_mix(
    base: MeasuredBase, bits: Mapping[str, int], reference: ComparedLogits, observer: Observer
) -> Measured:
    """Return the KL of a mix, and how more bits of each linear would change it.

    bits: by path of the linear; 4 for others.
    """

    def more(site: Site) -> list[int]:
        own = bits.get(site.path, 4)
        return [other for other in ALL_BITS if other > own]

    model, scores = _measured_model(base, base.format_of(bits), more)
    _show_progress(scores, len(base.sites), "measure the mix", observer)
    gradient = partial(divergence_gradient, reference=reference)
    logits = _run(base, model, scores, gradient)
    found = {
        path: {bits: sum(rows) / base.num_targets for bits, rows in by_bits.items()}
        for path, by_bits in scores.found.items()
    }
    return Measured(compare(reference, logits), found)


def compare_format(
    base: MeasuredBase, base_format: BaseFormat, reference: ComparedLogits
) -> Comparison:
    """Return how far the model in a format is from the 16-bit model, by a forward pass only."""
    return compare(reference, streamed_model(base, base_format).compared_logits(base.rows))


def streamed_model(
    base: MeasuredBase,
    base_format: BaseFormat,
    wrap: Callable[[QuantLinear, Site], nn.Module] | None = None,
) -> ComparisonModel:
    """Return the model in a format, one module in memory at a time.

    wrap: as of `trained_on_meta`.
    """
    kernel = kernel_for(profile_of(base.device), torch.float32)
    loaded = trained_on_meta(base.task, base.config, base_format, base.sites, kernel, wrap)
    source = open_source(base.folder, loaded.family)
    StreamedPlacement(base.device).place(loaded, source)
    return comparison_model(base.task, loaded, source, base.device, base_format.storage)


def _show_progress(scores: Scores, total: int, stage: str, observer: Observer) -> None:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        observer.advance(done)

    observer.stage(stage, total)
    scores.on_added = advance


def _measured_model(
    base: MeasuredBase, base_format: BaseFormat, others: Callable[[Site], Sequence[int]]
) -> tuple[ComparisonModel, Scores]:
    """Return the model in a format, with linears that score others, and their scores.

    others: returns the bits to score for a linear.
    """
    scores = Scores()

    def wrap(linear: QuantLinear, site: Site) -> MeasuredLinear:
        formats = [replace(base_format.of(site), bits=bits) for bits in others(site)]
        return MeasuredLinear(linear, site.path, formats, scores)

    kernel = kernel_for(profile_of(base.device), torch.float32)
    loaded = trained_on_meta(base.task, base.config, base_format, base.sites, kernel, wrap)
    source = open_source(base.folder, loaded.family)
    DevicePlacement(base.device).place(loaded, source)
    for site in base.sites:
        layer: Any = loaded.model.get_submodule(site.path)
        layer.read_weight = partial(_read, source, site, base_format.storage, base.device)
    blocks: Any = loaded.model.get_submodule(loaded.family.blocks)
    policy = ActivationPolicy.recompute_first(len(blocks), len(blocks))
    loaded.recomputation = Recomputation(blocks, policy)
    model = comparison_model(base.task, loaded, source, base.device, base_format.storage)
    return model, scores


def _read(source: FolderSource, site: Site, storage: torch.dtype, device: torch.device) -> Tensor:
    """Return the weight (out, in) of a linear in its 16-bit storage."""
    return site.from_file(source.read(f"{site.path}.weight")).contiguous().to(device, storage)


def _run(
    base: MeasuredBase,
    model: ComparisonModel,
    scores: Scores,
    gradient_of: Callable[[ComparedLogits], Tensor],
) -> ComparedLogits:
    """Run forward and backward, which adds scores, and return the predictions.

    gradient_of: returns the gradient of the head's input (n, d) float32.
    """
    loaded, batch = model.loaded, base.task.collate(base.rows)
    scores.segments = batch.segments
    loaded.model.train()  # Blocks are recomputed in training mode only.
    with torch.enable_grad(), _graph_start(loaded) as embedded:
        hidden = hidden_states(loaded, batch, base.device)
        positions, targets = targets_of(batch, base.device)
        hidden = hidden[positions]
    logits = ComparedLogits(hidden.detach(), model.head, targets)
    torch.autograd.grad(hidden, embedded, gradient_of(logits).to(hidden.dtype))
    return logits


@contextmanager
def _graph_start(loaded: LoadedModel) -> Iterator[list[Tensor]]:
    """Let the graph of a forward pass inside the block start with the embedded tokens.

    Yields a list that receives them. No parameter of the model needs a gradient.
    """
    found: list[Tensor] = []

    def start(_: Any, __: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    table = loaded.model.get_submodule(loaded.family.token_embedding)
    hook = table.register_forward_hook(start)
    try:
        yield found
    finally:
        hook.remove()
