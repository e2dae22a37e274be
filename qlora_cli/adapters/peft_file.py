"""An adapter's folder as data: which linears it adapts and with which factors. Needs no model.

PEFT knows one A and one B a module. A fused q/k/v projection of which q and v are adapted has two
of each, so it is written in the widest form that PEFT can read: A = [A_q; A_v] (2 rank, in) and B
with a block for each part and zeros elsewhere (out, 2 rank), alpha raised so that the scaling
stays. Where the blocks lie is remembered in the safetensors header, which PEFT passes over. A fused
adapter without that memory, as PEFT writes it, is one part over all outputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.adapters import peft_config
from qlora_cli.adapters.lora import LoraSettings
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.errors import ModelError, Problem, ProblemsError
from qlora_cli.files.safetensors_io import TensorEntry, read_header, read_tensor
from qlora_cli.nn.site import Site

SHOWN = 6
"""Layers named in an error; the rest is counted."""
_KEY = "qlora"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AdapterMetadata:
    """What our own writer adds in the header. rank, alpha, rslora: of one part.

    blocks: path of a fused linear -> role -> (first, end) of its rows, in the order of the columns.
    """

    rank: int
    alpha: float
    rslora: bool
    blocks: Mapping[str, Mapping[str, tuple[int, int]]]

    def header(self) -> dict[str, str]:
        """As safetensors metadata, which holds text only."""
        return {_KEY: json.dumps(vars(self))}

    @classmethod
    def of(cls, header: Mapping[str, str], file: Path) -> AdapterMetadata | None:
        """None where another program wrote the file. Raises ModelError where it is damaged."""
        if _KEY not in header:
            return None
        try:
            content = json.loads(header[_KEY])
            blocks = {
                path: {role: (int(first), int(end)) for role, (first, end) in parts.items()}
                for path, parts in content["blocks"].items()
            }
            rank, alpha = int(content["rank"]), float(content["alpha"])
            return cls(rank, alpha, bool(content["rslora"]), blocks)
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise ModelError(f"damaged header: {fault!r}", where=str(file)) from fault


@dataclass(frozen=True)
class LoraUpdate:
    """One product: adds scaling * B A to some rows of W. a (rank, in), b (rows, rank)."""

    rows: slice
    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class AdapterLayer:
    """One linear's factors in a file, read on demand.

    rows: each part's rows of the output, by role; a single part that covers all of them has no
    role of its own, `""`. settings: of each part.
    """

    path: str
    a: TensorEntry
    b: TensorEntry
    rows: Mapping[str, slice]
    settings: LoraSettings

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that the layer adapts."""
        return self.b.shape[0], self.a.shape[1]

    def read(self) -> list[LoraUpdate]:
        """The parts, on the host. Raises ModelError where blocks are not where they should be."""
        a, b = read_tensor(self.a), read_tensor(self.b)
        rank, scaling = self.settings.rank, self.settings.scaling
        columns = [slice(i * rank, (i + 1) * rank) for i in range(len(self.rows))]
        places = list(zip(self.rows.values(), columns, strict=True))
        parts = [LoraUpdate(rows, a[at].clone(), b[rows, at].clone(), scaling) for rows, at in places]
        for rows, at in places:
            b[rows, at] = 0
        if b.any():
            raise ModelError(
                f"{self.path}: B has values outside the blocks of {', '.join(self.rows)}",
                where=str(self.b.file),
            )
        return parts

    def slices_on(self, site: Site) -> dict[str, slice]:
        """The parts as this site names them; one part over a fused site is called `qkv`."""
        whole = "".join(site.roles)
        return {role or whole: rows for role, rows in self.rows.items()}


@dataclass(frozen=True)
class AdapterFile:
    """A folder's adapter: the layers it adapts, and nothing in memory yet."""

    folder: Path
    config: PeftConfig
    layers: Mapping[str, AdapterLayer]

    def check(self, sites: Sequence[Site]) -> None:
        """Raises ProblemsError where the adapter does not belong to a base with these linears."""
        problems = list(self._problems({site.path: site for site in sites}))
        if problems:
            rest = len(problems) - SHOWN
            more = [Problem("and so on", f"{rest} more")] if rest > 0 else []
            raise ProblemsError(
                f"the adapter in {self.folder} does not belong to this base",
                problems[:SHOWN] + more,
                hint="it was made for another base, or one of its files is damaged",
            )

    def _problems(self, sites: Mapping[str, Site]) -> Iterator[Problem]:
        for path, layer in self.layers.items():
            site = sites.get(path)
            if site is None:
                yield Problem(path, "the base has no such linear")
            elif layer.shape != (site.out_features, site.in_features):
                wanted = (site.out_features, site.in_features)
                yield Problem(path, f"made for a weight {layer.shape}, the base has {wanted}")
            elif not self.config.targets(path):
                yield Problem(path, f"{peft_config.CONFIG} does not target it")
        for path in sites:
            if path not in self.layers and self.config.targets(path):
                yield Problem(path, f"{peft_config.CONFIG} targets it, and it has no weights")


def open_adapter(folder: Path) -> AdapterFile:
    """What lies in the folder, checked but not read. Raises ModelError."""
    config = peft_config.read_peft_config(folder)
    file = folder / peft_config.WEIGHTS
    if not file.is_file():
        hint = "pickled weights are not read; save the adapter again as safetensors"
        raise ModelError(
            f"no {peft_config.WEIGHTS} in {folder}",
            hint=hint if (folder / "adapter_model.bin").is_file() else None,
        )
    entries, header = read_header(file)
    memory = AdapterMetadata.of(header, file)
    pairs = _pairs(entries, file)
    layers = {path: _layer(path, *pairs[path], config, memory) for path in sorted(pairs)}
    return AdapterFile(folder, config, layers)


def _pairs(
    entries: Mapping[str, TensorEntry], file: Path
) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """Each path's A and B. Raises ModelError for an empty file, a strange key, a lone factor."""
    if not entries:
        raise ModelError(
            f"an empty adapter: a file of {file.stat().st_size} bytes without a tensor",
            where=str(file),
            hint="it was saved by a program that lost the weights; save it again",
        )
    found: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in entries.items():
        named = peft_config.path_of(key)
        if named is None:
            raise ModelError(
                f"{key} is no LoRA factor",
                where=str(file),
                hint=f"a factor is called {peft_config.key_of('<path of the linear>', 'A')}",
            )
        found.setdefault(named[0], {})[named[1]] = entry
    for path, factors in found.items():
        if len(factors) != 2:
            raise ModelError(f"{path} has lora_{next(iter(factors))} alone", where=str(file))
    return {path: (factors["A"], factors["B"]) for path, factors in found.items()}


def _layer(
    path: str, a: TensorEntry, b: TensorEntry, config: PeftConfig, memory: AdapterMetadata | None
) -> AdapterLayer:
    rank = config.rank(path)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(
            f"{path}: rank {rank} means A ({rank}, in) and B (out, {rank}), and the file has "
            f"{a.shape} and {b.shape}",
            where=str(a.file),
        )
    if a.dtype != b.dtype or a.dtype not in _FLOATS:
        raise ModelError(f"{path}: A is {a.dtype} and B is {b.dtype}", where=str(a.file))
    rows = {"": slice(0, b.shape[0])}
    alpha, rslora = config.alpha(path), config.use_rslora
    if memory is not None:
        blocks = memory.blocks.get(path, {"": (0, b.shape[0])})
        rows = {role: slice(*span) for role, span in blocks.items()}
        rank, alpha, rslora = memory.rank, memory.alpha, memory.rslora
    settings = LoraSettings(rank, alpha, config.lora_dropout, a.dtype, rslora)
    layer = AdapterLayer(path, a, b, rows, settings)
    _check_agreement(layer, config)
    return layer


def _check_agreement(layer: AdapterLayer, config: PeftConfig) -> None:
    """The header and adapter_config.json say the same, or one of them was changed alone."""
    told, remembered = config.scaling(layer.path), layer.settings.scaling
    rank = layer.settings.rank * len(layer.rows)
    if rank != config.rank(layer.path) or abs(remembered - told) > 1e-9 * abs(told):
        raise ModelError(
            f"{layer.path}: {peft_config.CONFIG} scales it by {told:g} at rank "
            f"{config.rank(layer.path)}, and its weights were written for {remembered:g} at rank "
            f"{rank}",
            where=str(layer.a.file),
            hint="the two files are not of one adapter, or the config was edited",
        )
