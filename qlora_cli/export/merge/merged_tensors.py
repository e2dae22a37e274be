"""What each tensor of a merged checkpoint is: merging writes it, verifying computes it again.

A merged linear is W + scaling * B A, with W from one of two bases:

- `original`: the base's own weight as it lies in its file;
- `dequantized`: what training froze in its place, the same file tensor packed by the run's format
  and unpacked in the run's compute dtype (`QuantLinear.dequantize`); A and B were trained on that.
  Only linears that were packed are round-tripped; embeddings, head, norms and biases never were.

Everything else is the base's tensor, bit for bit where the dtype is kept and cast once where not.
(A run holds embeddings and head in 16 bit even where the file has float32; the file's values are
written.) Names, order and orientation are the file's own: a Conv1D goes back to (in, out), a tied
head that the file left out stays left out, buffers that constructors make (`Family.ignored`) are
not written.

The sum is made in float64, some rows at a time, then rounded to float32 and from there to the
output's dtype. So it hardly depends on the order in which a machine's matrix product adds, and
another machine comes to the same bits; `within_rounding_error` covers the rare value between two roundings.

Memory: the file's tensor, the result and what the base costs to unpack; never two layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qlora_cli.adapters.peft_file import AdapterFile, Part
from qlora_cli.errors import QloraError, UsageError, VerificationFailed
from qlora_cli.export.merge.combine import WeightedAdapter, combine, open_other_adapters
from qlora_cli.export.merge.underflow import Count, Underflow
from qlora_cli.files.dtype import dtype_name, file_dtype
from qlora_cli.files.locate import read_config
from qlora_cli.files.safetensors_io import Shape, is_finite
from qlora_cli.files.source import FolderSource
from qlora_cli.models.build import skeleton, weight_format_of
from qlora_cli.models.family import open_source
from qlora_cli.models.sites import find_sites
from qlora_cli.nn.quant import QuantLinear, WeightFormat
from qlora_cli.nn.site import Site
from qlora_cli.runs.run import Run

MergeBase = Literal["original", "dequantized"]

CHUNK = 2**18
"""Elements summed at a time: 2 MiB in float64, which stays in a processor's cache."""
_SLACK = 2.0**-44
"""Relative error that another order of a float64 sum can have, with room for a rank of 256."""


@dataclass(frozen=True)
class MergedTensors:
    """The tensors of a merged checkpoint, made one at a time.

    sites: every linear of the model. adapter: None for a model trained in full. held: how training
    held the base. device: where packing is done; the kind that trained, where it can be had,
    because another device's kernels may round a tie between two codes differently.
    """

    source: FolderSource
    sites: Sequence[Site]
    adapter: AdapterFile | None
    weight_format: WeightFormat
    base: MergeBase
    dtype: torch.dtype
    device: torch.device

    def shapes(self) -> dict[str, Shape]:
        """File name -> what will be written, in the file's order."""
        return {
            file_name: Shape(self._dtype_of(name), self.source.shape(name))
            for file_name, name in self._names.items()
        }

    def adapted(self) -> frozenset[str]:
        """File names of the tensors that the adapter changes."""
        layers = self.adapter.layers if self.adapter is not None else {}
        return frozenset(self.source.file_name(f"{path}.weight") for path in layers)

    def make(self, file_name: str, underflow: Underflow | None = None) -> Tensor:
        """One tensor as it will be written. underflow: counts what becomes 0 in it.

        Raises VerificationFailed where a value is too large for the dtype, QloraError where the
        base or the adapter is not finite.
        """
        name = self._names[file_name]
        site, parts = self._sites.get(name), self._parts(name)
        count = underflow.of_tensor(file_name) if underflow is not None else _uncounted
        if site is not None and (parts or self.base == "dequantized"):
            made = self._merged(name, site, parts, count)
        else:
            made = self._copied(name, count)
        if not is_finite(made):
            if not all(is_finite(factor) for part in parts for factor in (part.a, part.b)):
                raise self._not_finite(name)
            raise _too_large(file_name, self.dtype)
        return made

    def within_rounding_error(self, file_name: str, found: Tensor) -> bool:
        """Whether every value of `found` is the sum, rounded, within the sum's own error.

        Asked of tensors that differ in bits from what `make` gives here. found: in the file's
        shape and the output's dtype.
        """
        name = self._names[file_name]
        site, parts = self._sites.get(name), self._parts(name)
        if site is None or not parts:
            return False
        weight = self._base_of(name, site)
        turned = found.t() if site.transposed else found
        sizes = _sums(weight.abs(), [replace(p, a=p.a.abs(), b=p.b.abs()) for p in parts])
        return all(
            _lies_between(turned[rows], total - size * _SLACK, total + size * _SLACK)
            for (rows, total), (_, size) in zip(_sums(weight, parts), sizes, strict=True)
        )

    def _not_finite(self, name: str) -> QloraError:
        assert self.adapter is not None
        return QloraError(
            f"the adapter's factors of {name} are not finite",
            where=str(self.adapter.folder),
            hint="the training diverged or the file is damaged; look at the losses with "
            "`qlora report`",
        )

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """File name -> the model's name."""
        return {self.source.file_name(name): name for name in self.source.names()}

    @cached_property
    def _sites(self) -> Mapping[str, Site]:
        return {f"{site.path}.weight": site for site in self.sites}

    def _dtype_of(self, name: str) -> torch.dtype:
        own = self.source.entry(name).dtype
        return self.dtype if own.is_floating_point else own

    def _parts(self, name: str) -> list[Part]:
        layers = self.adapter.layers if self.adapter is not None else {}
        layer = layers.get(name.removesuffix(".weight"))
        return layer.read() if layer is not None else []

    def _read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        if not is_finite(tensor):
            raise QloraError(
                f"{self.source.file_name(name)} is not finite in the base itself",
                where=str(self.source.folder),
                hint="fetch the base again; it is damaged",
            )
        return tensor

    def _base_of(self, name: str, site: Site) -> Tensor:
        """The weight (out, in) that the adapter is added to."""
        tensor = self._read(name)
        weight = tensor.t() if site.transposed else tensor
        if self.base == "original":
            return weight
        layer = pack_linear(site, self.weight_format, weight.contiguous().to(self.device))
        # Unpacked it is as large again; both together would be the peak of the whole job.
        del tensor, weight
        return layer.dequantize().cpu()

    def _copied(self, name: str, count: Count) -> Tensor:
        own = self._read(name)
        made = own.to(self._dtype_of(name))
        if made.dtype != own.dtype:
            count(own, made)
        return made

    def _merged(self, name: str, site: Site, parts: Sequence[Part], count: Count) -> Tensor:
        weight = self._base_of(name, site)
        made = torch.empty(weight.shape, dtype=self.dtype)
        for rows, total in _sums(weight, parts):
            made[rows] = total.float()
            count(total, made[rows])
        return made.t().contiguous() if site.transposed else made


def pack_linear(site: Site, weight_format: WeightFormat, weight: Tensor) -> QuantLinear:
    """A linear as training held it, from its weight (out, in)."""
    layer = QuantLinear(
        site.in_features, site.out_features, bias=False, weight_format=weight_format
    )
    layer.pack(weight)
    return layer


def open_merged_tensors(
    run: Run,
    base: MergeBase,
    dtype: torch.dtype,
    device: torch.device,
    weight: float = 1.0,
    others: Sequence[tuple[Path, float]] = (),
) -> MergedTensors:
    """What merging this run gives.

    weight: of its own adapter. others: where further adapters lie, and their weights. Raises
    InputError where the run, its base or an adapter is not whole or they do not belong together.
    """
    recipe = run.recipe
    folder = run.base_folder
    config = read_config(folder / "config.json")
    weight_format = weight_format_of(recipe, file_dtype(config))
    model, family = skeleton(config, weight_format.compute)
    sites = find_sites(model, family, config)
    adapter = None
    if recipe.adapter.method == "lora":
        own = WeightedAdapter(run.adapter_file, weight)
        adapter = combine([own, *open_other_adapters(run, others)])
        adapter.check(sites)
    else:
        _refuse_adapters(run, weight, others)
        folder = run.trained_weights
        # Trained weights are in the dtype that they were trained in.
        weight_format = replace(weight_format, storage=weight_format.compute)
    source = open_source(folder, family)
    return MergedTensors(source, sites, adapter, weight_format, base, dtype, device)


def _refuse_adapters(run: Run, weight: float, others: Sequence[tuple[Path, float]]) -> None:
    if others or weight != 1.0:
        raise UsageError(
            f"{run.path} was trained in full; it has no adapter to weigh or to add to",
            where="--with" if others else "--weight",
        )


def _uncounted(exact: Tensor, made: Tensor) -> None: ...


def _sums(weight: Tensor, parts: Sequence[Part]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W + sum of scaling B A in these rows), float64, some rows at a time.

    Each sum lies in the same buffer and is gone when the next one is asked for.
    """
    factors = [(part.rows, part.b.double() * part.scaling, part.a.double()) for part in parts]
    num_rows, width = weight.shape
    step = max(1, CHUNK // width)
    buffer = torch.empty(step, width, dtype=torch.float64)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        total = buffer[: rows.stop - start].copy_(weight[rows])
        for own, b, a in factors:
            first, end = max(start, own.start), min(rows.stop, own.stop)
            if first < end:
                total[first - start : end - start].addmm_(b[first - own.start : end - own.start], a)
        yield rows, total


def _lies_between(found: Tensor, low: Tensor, high: Tensor) -> bool:
    """Rounding keeps order, so a rounded sum lies between its bounds, rounded the same way."""
    least, most = (bound.float().to(found.dtype) for bound in (low, high))
    return bool(((least <= found) & (found <= most)).all())


def _too_large(name: str, dtype: torch.dtype) -> VerificationFailed:
    told = dtype_name(dtype)
    return VerificationFailed(
        f"{name} has values that {told} cannot hold",
        hint=f"the largest number in {told} is {torch.finfo(dtype).max:g}; merge with "
        "--dtype bfloat16",
    )
