"""Writes a model's adapter to a folder in PEFT's format.

See `adapters/peft_file.py` for how several roles of a fused projection are stored, and
`adapters/peft_stacks.py` for experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.adapters import peft_config, peft_names
from qlora_cli.adapters.adapted_modules import adapted_layers, adapted_stacks
from qlora_cli.adapters.dora import DoraLinear
from qlora_cli.adapters.lora import Factors, LoraLinear, LoraSettings
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.adapters.peft_initial import both
from qlora_cli.adapters.peft_metadata import AdapterMetadata
from qlora_cli.adapters.peft_prefix import FOLDER, write_prefix
from qlora_cli.adapters.peft_stacks import EXPERT_LINEARS, file_paths, to_file
from qlora_cli.data.template import TEMPLATE_FILE
from qlora_cli.files.atomic import RESUME_HINT, atomic_folder, report_write_errors, write_json
from qlora_cli.files.finite import finite_cpu_copy
from qlora_cli.files.safetensors_io import TensorSpec, write_tensors
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.prefix import block_prefixes
from qlora_cli.models.trained_head import head_parameters
from qlora_cli.recipe.adapter import Adapter
from qlora_cli.recipe.schema import Recipe


def save_adapter(
    loaded: LoadedModel, recipe: Recipe, folder: Path, chat_template: str | None = None
) -> None:
    """Write the adapter of `loaded` atomically; an older adapter in `folder` is replaced.

    recipe: the recipe that the adapter was trained with. chat_template: the Jinja text of its
    training if that is not the base's, which is written next to the adapter.

    Raises QloraError if it cannot be written, NotFinite if a value is NaN or infinite.
    """
    layers = dict(adapted_layers(loaded.model))
    factors = dict(_factors(loaded, layers))
    for name, parameter in head_parameters(loaded).items():
        spec = TensorSpec(parameter.dtype, tuple(parameter.shape))
        factors[peft_names.saved_name(name)] = spec, parameter.detach
    specs = {name: spec for name, (spec, _) in factors.items()}

    def compute(name: str) -> Tensor:
        return finite_cpu_copy(name, factors[name][1]())

    header = {"format": "pt", **_metadata(loaded, layers, recipe.adapter).header()}
    with report_write_errors("the adapter", folder, RESUME_HINT), atomic_folder(folder) as partial:
        config = _peft_config(loaded, layers, recipe)
        write_json(partial / peft_config.CONFIG, config.model_dump(mode="json"))
        write_tensors(partial / peft_config.WEIGHTS, specs, compute, header)
        if prefixes := block_prefixes(loaded.model):
            write_prefix(prefixes, partial / FOLDER, recipe.model.name)
        if chat_template is not None:
            (partial / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def _factors(
    loaded: LoadedModel, layers: Mapping[str, LoraLinear]
) -> Iterator[tuple[str, tuple[TensorSpec, Callable[[], Tensor]]]]:
    """Yield the name of each tensor in the file, its form, and the function that computes it."""
    for path, layer in layers.items():
        for letter in "AB":
            spec = _stacked_spec(layer, letter)
            yield peft_names.tensor_name(path, letter), (spec, partial(_stacked, layer, letter))
        if isinstance(layer, DoraLinear):
            magnitude = partial(_magnitude, layer)
            spec = TensorSpec(torch.float32, (layer.base.out_features,))
            yield peft_names.magnitude_name(path), (spec, magnitude)
    stacks = dict(adapted_stacks(loaded.model))
    for path, in_file in file_paths(stacks).items():
        lora = stacks[path].lora()
        for letter, factor in (("A", lora.a), ("B", lora.b)):
            compute = partial(to_file, factor.detach(), letter)
            shape = tuple(to_file(factor.detach().to("meta"), letter).shape)
            yield (
                peft_names.tensor_name(in_file, letter),
                (TensorSpec(factor.dtype, shape), compute),
            )


def _metadata(
    loaded: LoadedModel, layers: Mapping[str, LoraLinear], settings: Adapter
) -> AdapterMetadata:
    fused = {site.path for site in loaded.sites if len(site.roles) > 1}
    blocks = {
        path: {role: (rows.start, rows.stop) for role, rows in layer.lora_slices.items()}
        for path, layer in layers.items()
        if path in fused
    }
    own = {path: layer.settings for path, layer in layers.items()}
    ranks = {path: o.rank for path, o in own.items() if o.rank != settings.rank}
    alphas = {path: o.alpha for path, o in own.items() if o.alpha != settings.alpha}
    init = settings.init if settings.is_initialized else ""
    given = (settings.rank, settings.alpha, settings.rslora)
    return AdapterMetadata(*given, blocks, ranks, alphas, init)


def _peft_config(
    loaded: LoadedModel, layers: Mapping[str, LoraLinear], recipe: Recipe
) -> PeftConfig:
    """Return the adapter's settings for PEFT.

    The most common rank becomes the rank of the adapter and other ranks become patterns, because
    not every program that reads adapters supports patterns.
    """
    targets = _Targets.of(loaded, layers)
    stacked = {path: _stacked_settings(layer) for path, layer in layers.items()}
    for path, stack in adapted_stacks(loaded.model):
        stacked[path] = (stack.settings.rank, stack.settings.alpha)
    pairs = Counter(stacked.values()).most_common(1)
    # A head alone has no rank, and PEFT needs one.
    most_common = pairs[0][0] if pairs else (recipe.adapter.rank, recipe.adapter.alpha)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for pair in sorted(set(stacked.values()) - {most_common}):
        paths = {path for path, own in stacked.items() if own == pair}
        for name in (*targets.modules(paths), *targets.parameters(paths)):
            ranks[name], alphas[name] = pair
    rank, alpha = most_common
    heads = list(loaded.family.classifier.modules)
    return PeftConfig(
        task_type=peft_config.CLASSIFICATION if heads else "CAUSAL_LM",
        modules_to_save=heads or None,
        base_model_name_or_path=recipe.model.name,
        revision=recipe.model.revision,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=recipe.adapter.dropout,
        use_rslora=recipe.adapter.rslora,
        use_dora=any(isinstance(layer, DoraLinear) for layer in layers.values()),
        target_modules=(targets.modules(stacked) or None) if stacked else peft_config.NO_TARGETS,
        target_parameters=targets.parameters(stacked) or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=any(site.transposed for site in loaded.sites if site.path in layers),
    )


@dataclass(frozen=True)
class _Targets:
    """The adapted linears and experts as PEFT names them.

    paths: of all modules of the model. linears: paths of the linears that are targeted as modules.
    weights: paths of the linears that are targeted by their parameter. stacks: of experts.
    """

    paths: Sequence[str]
    linears: frozenset[str]
    weights: frozenset[str]
    stacks: frozenset[str]

    @classmethod
    def of(cls, loaded: LoadedModel, layers: Iterable[str]) -> _Targets:
        """Return the targets of a model. layers: paths of the adapted linears."""
        paths = [name for name, _ in loaded.model.named_modules()]
        paths += loaded.family.other_modules
        stacks = frozenset(path for path, _ in adapted_stacks(loaded.model))
        has_name = {path: path.rpartition(".")[2] in EXPERT_LINEARS for path in layers}
        weights = frozenset(path for path in layers if loaded.stacks and has_name[path])
        return cls(paths, frozenset(layers) - weights, weights, stacks)

    def modules(self, among: Collection[str]) -> list[str]:
        """Return the endings of the linears in `among` that are targeted as modules."""
        return peft_config.shortest_endings(self.linears & set(among), self.paths)

    def parameters(self, among: Collection[str]) -> list[str]:
        """Return the endings of the parameters in `among` that are targeted."""
        weights = peft_config.shortest_endings(self.weights & set(among), self.paths)
        stacks = peft_config.shortest_endings(self.stacks & set(among), self.paths, 2)
        return sorted([*(f"{ending}.weight" for ending in weights), *stacks])


def _stacked_settings(layer: LoraLinear) -> tuple[int, float]:
    """Return (rank, alpha) of the stacked adapters of a linear, with unchanged scaling."""
    settings, num_roles = _settings_in_file(layer), len(layer.lora_slices)
    factor = num_roles**0.5 if settings.rslora else num_roles
    return settings.rank * num_roles, settings.alpha * factor


def _settings_in_file(layer: LoraLinear) -> LoraSettings:
    """Return the settings of one role, of twice the rank with the initial factors in the file."""
    return layer.settings.doubled() if layer.initial else layer.settings


def _factors_in_file(layer: LoraLinear, role: str) -> Factors:
    """Return the factors of one role, with the initial ones of `adapter.init`, on one device."""
    b, a = layer.lora_b[role].detach(), layer.lora_a[role].detach()
    if role not in layer.initial:
        return Factors(b, a)
    return both(Factors(b.cpu(), a.cpu()), layer.initial[role])


def _stacked_spec(layer: LoraLinear, factor: str) -> TensorSpec:
    """Return dtype and shape of the layer's stacked A or B. factor: `A` or `B`."""
    stacked = _settings_in_file(layer).rank * len(layer.lora_slices)
    if factor == "A":
        return TensorSpec(layer.settings.dtype, (stacked, layer.base.in_features))
    return TensorSpec(layer.settings.dtype, (layer.base.out_features, stacked))


def _stacked(layer: LoraLinear, factor: str) -> Tensor:
    """Return A (roles * rank, in), or B (out, roles * rank) with one block per role."""
    if factor == "A":
        return torch.cat([_factors_in_file(layer, role).a for role in layer.lora_slices])
    rank, spec = _settings_in_file(layer).rank, _stacked_spec(layer, "B")
    parts = {role: _factors_in_file(layer, role).b for role in layer.lora_slices}
    device = next(iter(parts.values())).device
    b = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    for index, (role, rows) in enumerate(layer.lora_slices.items()):
        b[rows, index * rank : (index + 1) * rank] = parts[role]
    return b


def _magnitude(layer: DoraLinear) -> Tensor:
    """Return m of all rows (out,); rows without an adapter keep the length of W."""
    m = layer.base_lengths().clone()
    for role, rows in layer.lora_slices.items():
        m[rows] = layer.lora_magnitude[role].detach()
    return m
