"""Reads an adapter's folder: which linear layers it adapts and their matrices. Needs no model.

PEFT stores one A and one B per module. A fused q/k/v projection with adapters on q and v has two of
each. They are stored as one pair that PEFT can read: A = [A_q; A_v] of shape (2 rank, in), and B of
shape (out, 2 rank) with B_q and B_v as blocks and zeros elsewhere; alpha is raised so that the
scaling is unchanged. The safetensors header, which PEFT ignores, contains the rows of the blocks.
Without that header, as in PEFT's own files, the adapter of a fused projection is one update of all
its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.adapters import peft_config
from qlora_cli.adapters.lora import LoraSettings
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.adapters.peft_magnitudes import check_magnitudes, magnitude_entries
from qlora_cli.adapters.peft_metadata import AdapterMetadata
from qlora_cli.adapters.peft_names import factor_pairs, magnitude_name, parse_saved_name
from qlora_cli.adapters.peft_prefix import prefix_folder
from qlora_cli.adapters.peft_stacks import AdapterStack, stack_paths, unused_targets
from qlora_cli.errors import ModelError, Problem, ProblemsError
from qlora_cli.files.safetensors_io import TensorEntry, is_finite, read_header, read_tensor
from qlora_cli.nn.site import Site

MAX_LISTED = 6
"""Number of layers that an error message names; of the others it gives the number."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoraUpdate:
    """One low-rank update of a weight: W[rows] + scaling * B A.

    rows: the rows of W that it changes.
    a: (rank, in), b: (number of rows, rank), on the CPU.
    magnitude: for DoRA, the length that each row of the sum is scaled to (number of rows,).
    """

    rows: slice
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class AdapterLayer:
    """The A and B of one linear layer in a file. `read` reads them.

    path: the linear layer.
    a, b: the entries of the stacked A and B.
    rows: role -> the role's rows of the output. The role is `""` if one update covers all rows.
    settings: the settings of each update.
    magnitude: the entry of DoRA's magnitudes of all rows of the output; None for LoRA.
    of_one_half: settings of the trained and of the initial factors if each update has both, one
    after the other (`peft_initial.py`); None for a plain adapter.
    """

    path: str
    a: TensorEntry
    b: TensorEntry
    rows: Mapping[str, slice]
    settings: LoraSettings
    magnitude: TensorEntry | None = field(default=None, kw_only=True)
    of_one_half: LoraSettings | None = field(default=None, kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape (out, in) of the weight that the layer adapts."""
        return self.b.shape[0], self.a.shape[1]

    def read(self) -> list[LoraUpdate]:
        """Read the updates of all roles.

        Raises ModelError if a value is not finite, or if B has values outside the blocks of the
        roles.
        """
        a, b = read_tensor(self.a), read_tensor(self.b)
        m = None if self.magnitude is None else read_tensor(self.magnitude)
        if not all(is_finite(tensor) for tensor in (a, b, m) if tensor is not None):
            names = "A or B" if m is None else "A, B or m"
            raise ModelError(
                f"the adapter's {names} for {self.path} has values that are not finite",
                where=str(self.a.file),
                hint="the training diverged or the file is damaged; check the losses with "
                "`qlora report`",
            )
        rank, scaling = self.settings.rank, self.settings.scaling
        columns = [slice(i * rank, (i + 1) * rank) for i in range(len(self.rows))]
        blocks = list(zip(self.rows.values(), columns, strict=True))
        updates = [
            LoraUpdate(
                rows,
                a[column].clone(),
                b[rows, column].clone(),
                scaling,
                None if m is None else m[rows].clone(),
            )
            for rows, column in blocks
        ]
        for rows, column in blocks:
            b[rows, column] = 0
        if b.any():
            raise ModelError(
                f"{self.path}: B has values outside the blocks of {', '.join(self.rows)}",
                where=str(self.b.file),
            )
        return updates

    def slices_on(self, site: Site) -> dict[str, slice]:
        """Return role -> rows with the roles of `site`. One update of all rows is called `qkv`."""
        all_roles = "".join(site.roles)
        return {role or all_roles: rows for role, rows in self.rows.items()}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk: its folder, its settings, and the layers that it adapts.

    stacks: the stacked parameters of experts that it adapts, by path. saved: name -> entry of the
    parameters that are saved whole, such as those of a classification head. No tensor is in memory.
    Not to be confused with `recipe.adapter.Adapter`, the recipe's section.
    """

    folder: Path
    config: PeftConfig
    layers: Mapping[str, AdapterLayer]
    stacks: Mapping[str, AdapterStack] = field(default_factory=dict)
    saved: Mapping[str, TensorEntry] = field(default_factory=dict, kw_only=True)

    @property
    def prefix(self) -> Path | None:
        """Return the folder of the prefix that was trained with the adapter; None for none."""
        return prefix_folder(self.folder)

    def check(self, sites: Sequence[Site]) -> None:
        """Raise ProblemsError if the adapter does not fit a base.

        sites: its linear layers and its stacks of experts.
        """
        linears = {site.path: site for site in sites if not site.num_experts}
        stacks = {site.path: site for site in sites if site.num_experts}
        problems = [*self._problems(linears), *self._stack_problems(stacks)]
        if problems:
            rest = len(problems) - MAX_LISTED
            more = [Problem("and so on", f"{rest} more")] if rest > 0 else []
            raise ProblemsError(
                f"the adapter in {self.folder} does not belong to this base",
                problems[:MAX_LISTED] + more,
                hint="it was trained on another base, or one of its files is damaged",
            )

    def _problems(self, sites: Mapping[str, Site]) -> Iterator[Problem]:
        for path, layer in self.layers.items():
            site = sites.get(path)
            if site is None:
                yield Problem(path, "the base has no such linear layer")
            elif layer.shape != (site.out_features, site.in_features):
                shape = (site.out_features, site.in_features)
                yield Problem(path, f"for a weight of shape {layer.shape}; the base has {shape}")
            elif not self.config.targets(path):
                yield Problem(path, f"{peft_config.CONFIG} does not target it")
        for path in sites:
            if path not in self.layers and self.config.targets(path):
                yield Problem(path, f"{peft_config.CONFIG} targets it, but it has no weights")

    def _stack_problems(self, sites: Mapping[str, Site]) -> Iterator[Problem]:
        for path, stack in self.stacks.items():
            site = sites.get(path)
            if site is None:
                yield Problem(path, "the base has no such experts")
                continue
            found = (stack.num_experts, *stack.shape)
            needed = (site.num_experts, site.out_features, site.in_features)
            if found != needed:
                yield Problem(path, f"for experts of shape {found}; the base has {needed}")
        for path in sites:
            if path not in self.stacks and self.config.targets_parameter(path):
                yield Problem(path, f"{peft_config.CONFIG} targets it, but it has no weights")


def open_adapter(folder: Path) -> AdapterFile:
    """Check the adapter in `folder` and return it without reading its tensors.

    folder: in PEFT's format.

    Raises ModelError if files are missing, damaged or contradict each other, or if the adapter uses
    a feature that is not supported.
    """
    config = peft_config.read_peft_config(folder)
    file = folder / peft_config.WEIGHTS
    if not file.is_file():
        hint = "pickled weights are not read; save the adapter again as safetensors"
        raise ModelError(
            f"no {peft_config.WEIGHTS} in {folder}",
            hint=hint if (folder / "adapter_model.bin").is_file() else None,
        )
    entries, header = read_header(file)
    metadata = AdapterMetadata.of(header, file)
    saved = _saved(entries, config)
    magnitudes = magnitude_entries(entries)
    others = {*saved, *map(magnitude_name, magnitudes)}
    factors = {name: e for name, e in entries.items() if name not in others}
    # An adapter may be a classification head alone.
    pairs = factor_pairs(factors, file) if factors or not saved else {}
    paths = stack_paths(config, pairs)
    stacks = {
        stack: _stack(stack, *pairs.pop(path), config)
        for path, stack in paths.items()
        if path in pairs
    }
    layers = {path: _layer(path, *pairs[path], config, metadata) for path in sorted(pairs)}
    if config.use_dora or magnitudes:
        check_magnitudes(magnitudes, {path: y.shape for path, y in layers.items()}, config, file)
        layers = {path: replace(y, magnitude=magnitudes[path]) for path, y in layers.items()}
    for target in unused_targets(config, [*stacks, *(f"{path}.weight" for path in layers)]):
        raise ModelError(
            f"{peft_config.CONFIG} targets {target}, but the file has no adapter of it",
            where=str(file),
        )
    by_parameter = {parameter: entries[name] for name, parameter in saved.items()}
    return AdapterFile(folder, config, layers, stacks, saved=by_parameter)


def _saved(entries: Mapping[str, TensorEntry], config: PeftConfig) -> dict[str, str]:
    """Return name in the file -> parameter's name of the tensors that are saved whole."""
    modules = config.modules_to_save or []
    names = {name: parse_saved_name(name, modules) for name in entries}
    return {name: parameter for name, parameter in names.items() if parameter is not None}


def _stack(path: str, a: TensorEntry, b: TensorEntry, config: PeftConfig) -> AdapterStack:
    rank = config.rank(path)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] % rank or a.shape[0] != b.shape[1]:
        raise ModelError(
            f"{path}: rank {rank} means A (experts {rank}, in) and B (out, {rank} experts), but "
            f"the file has {a.shape} and {b.shape}",
            where=str(a.file),
        )
    _check_dtypes(path, a, b)
    alpha = config.alpha(path)
    settings = LoraSettings(rank, alpha, config.lora_dropout, a.dtype, config.use_rslora)
    return AdapterStack(path, a, b, settings)


def _check_dtypes(path: str, a: TensorEntry, b: TensorEntry) -> None:
    if a.dtype != b.dtype or a.dtype not in _FLOATS:
        raise ModelError(f"{path}: A is {a.dtype} and B is {b.dtype}", where=str(a.file))


def _layer(
    path: str, a: TensorEntry, b: TensorEntry, config: PeftConfig, metadata: AdapterMetadata | None
) -> AdapterLayer:
    rank = config.rank(path)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(
            f"{path}: rank {rank} means A ({rank}, in) and B (out, {rank}), but the file has "
            f"{a.shape} and {b.shape}",
            where=str(a.file),
        )
    _check_dtypes(path, a, b)
    rows = {"": slice(0, b.shape[0])}
    alpha, rslora = config.alpha(path), config.use_rslora
    if metadata is not None:
        blocks = metadata.blocks.get(path, {"": (0, b.shape[0])})
        if not all(0 <= first < end <= b.shape[0] for first, end in blocks.values()):
            raise ModelError(f"damaged header: impossible rows of {path}", where=str(a.file))
        rows = {role: slice(*span) for role, span in blocks.items()}
        rank = metadata.ranks.get(path, metadata.rank)
        alpha = metadata.alphas.get(path, metadata.alpha)
        rslora = metadata.rslora
    settings = LoraSettings(rank, alpha, config.lora_dropout, a.dtype, rslora)
    one_half = settings if metadata is not None and metadata.init else None
    if one_half is not None:
        settings = one_half.doubled()
    layer = AdapterLayer(path, a, b, rows, settings, of_one_half=one_half)
    _check_agreement(layer, config)
    return layer


def _check_agreement(layer: AdapterLayer, config: PeftConfig) -> None:
    """Raise ModelError if the header and adapter_config.json differ in rank or scaling."""
    scaling, written = config.scaling(layer.path), layer.settings.scaling
    rank = layer.settings.rank * len(layer.rows)
    if rank != config.rank(layer.path) or abs(written - scaling) > 1e-9 * abs(scaling):
        raise ModelError(
            f"{layer.path}: {peft_config.CONFIG} scales it by {scaling:g} at rank "
            f"{config.rank(layer.path)}, but its weights were written for {written:g} at rank "
            f"{rank}",
            where=str(layer.a.file),
            hint="the two files belong to different adapters, or the config was edited",
        )
