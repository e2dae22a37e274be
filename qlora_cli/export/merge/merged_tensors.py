"""The tensors of a merged checkpoint. Merging writes them; verification computes them again.

A merged linear is W + scaling * B A, computed in float64 (`lora_sum.py`) and rounded to the output
dtype. W comes from one of two bases:

- `original`: the weight in the base's own file;
- `dequantized`: the weight that training used, that is, the file's weight packed in the run's
  format and unpacked in the run's compute dtype (`QuantLinear.dequantize`). A and B were trained on
  this weight. Only linears that training packed go through this round trip; embeddings, head,
  norms and biases do not.

Every other tensor is the base's: equal bit for bit if the dtype is unchanged, else cast once. (A
run keeps embeddings and head in 16 bit even if the file has float32; the file's values are
written.) Names, order and orientation are those of the base's file. A Conv1D weight is written as
(in, out). A tied head that the file omits is omitted. Buffers that a constructor creates
(`Family.ignored`) are not written.

Memory: one tensor of the file, its result, and what the base needs to unpack it; never two layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.adapters.peft_file import AdapterFile, LoraUpdate
from qlora_cli.adapters.peft_initial import OwnBase
from qlora_cli.errors import VerificationFailed
from qlora_cli.export.merge.expert_tensors import ExpertTensor
from qlora_cli.export.merge.lora_sum import merged_rows, rounds_to
from qlora_cli.export.merge.packed_weight import trained_weight
from qlora_cli.export.merge.underflow import Count, Underflow
from qlora_cli.export.options import FALLBACK_DTYPE, MergeBase
from qlora_cli.files.dtype import dtype_name
from qlora_cli.files.safetensors_io import TensorSpec, is_finite
from qlora_cli.files.source import FolderSource, TensorSource
from qlora_cli.models.base_format import BaseFormat
from qlora_cli.models.placement.held import PackedCopy
from qlora_cli.models.residual import residual_source
from qlora_cli.nn.expert_stack import StackLora
from qlora_cli.nn.packed_tensors import pack_weight
from qlora_cli.nn.site import Site
from qlora_cli.tasks.task import Task


@dataclass(frozen=True)
class MergedTensors:
    """The tensors of a merged checkpoint, computed one at a time.

    source: the base's files, or the trained weights of a full fine-tuning.
    task: the training objective of the run.
    sites: every linear of the model.
    adapter: the adapter to merge; None for a full fine-tuning.
    base_format: how training stored each of the base's linears.
    base: the weights that the adapter is added to.
    dtype: dtype of the floating-point tensors of the merged checkpoint.
    device: device that packs weights. It should be of the kind that trained, because the kernels
        of another kind may round a tie between two codes differently.
    experts: name in the model -> tensor, of all tensors with weights of experts.
    others: paths of the parts of a composed model that are copied bit for bit, in any dtype.
    copy: the packed copy of the base, for running the trained model and nothing else.
    config_entries: entries of config.json that differ from the base's.
    own_base: what training added to its base, if that is not `adapter` (`adapter.init`).
    """

    source: FolderSource
    task: Task
    sites: Sequence[Site]
    adapter: AdapterFile | None
    base_format: BaseFormat
    base: MergeBase
    dtype: torch.dtype
    device: torch.device
    experts: Mapping[str, ExpertTensor] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    copy: PackedCopy | None = None
    config_entries: Mapping[str, Any] = field(default_factory=dict)
    own_base: OwnBase | None = None

    def shapes(self) -> dict[str, TensorSpec]:
        """Return tensor name -> shape and dtype of the merged checkpoint, in the file's order."""
        return {
            file_name: TensorSpec(self._dtype_of(name), self.source.shape(name))
            for file_name, name in self._names.items()
        }

    @property
    def trained_adapter(self) -> AdapterFile | None:
        """Return the adapter that is added to the base of the training."""
        return self.adapter if self.own_base is None else self.own_base.added

    @property
    def trained_source(self) -> TensorSource:
        """Return the weights that training packed."""
        if self.own_base is None or not self.own_base.is_residual:
            return self.source
        return residual_source(self.source, self.own_base.start, self.sites)

    @property
    def prefix(self) -> Path | None:
        """Return the folder of the prefix that was trained with the adapter; None for none."""
        return None if self.adapter is None else self.adapter.prefix

    def before_training(self) -> MergedTensors:
        """Return the merge of the model at the start of the training."""
        start = None if self.own_base is None else self.own_base.before_training()
        return replace(self, adapter=None, own_base=start)

    @property
    def _added(self) -> AdapterFile | None:
        """Return the adapter that is added to `base`."""
        return self.adapter if self.base == "original" else self.trained_adapter

    def adapted_names(self) -> frozenset[str]:
        """Return the names, in the file, of the tensors that the adapter changes."""
        added = self._added
        if added is None:
            return frozenset()
        names = [f"{path}.weight" for path in added.layers]
        names += [n for n, t in self.experts.items() if t.site.path in added.stacks]
        return frozenset(map(self.source.file_name, names))

    def compute(self, file_name: str, underflow: Underflow | None = None) -> Tensor:
        """Return one tensor as the merged checkpoint contains it, on the CPU.

        file_name: the tensor's name in the file.
        underflow: counts the values of this tensor that become 0 in the output dtype.

        Raises VerificationFailed if a value is too large for the dtype, QloraError if the base or
        the adapter has values that are not finite.
        """
        name = self._names[file_name]
        site, parts = self._sites.get(name), self._parts(name)
        count = underflow.of_tensor(file_name) if underflow is not None else _ignore
        if site is not None and (parts or self.base == "dequantized"):
            result = site.to_file(self._sum(self._base_weight(name, site), parts, count))
        elif name in self.experts and (self._adapts_experts(name) or self.base == "dequantized"):
            sums = (self._sum(*matrix, count) for matrix in self._expert_matrices(name))
            result = self.experts[name].tensor(sums, self.dtype)
        else:
            result = self._copied(name, count)
        if not is_finite(result):
            raise _too_large(file_name, self.dtype)
        return result

    def within_rounding_error(self, file_name: str, tensor: Tensor) -> bool:
        """Return whether `tensor` differs from `compute(file_name)` by the sum's own error only.

        tensor: a tensor of a merged checkpoint, in the file's shape and the output dtype. Returns
        False for a tensor that the adapter does not change: a copy has no rounding error.
        """
        name = self._names[file_name]
        site, parts = self._sites.get(name), self._parts(name)
        if site is not None and parts:
            return rounds_to(site.from_file(tensor), self._base_weight(name, site), parts)
        if name not in self.experts or not self._adapts_experts(name):
            return False
        found = (matrix for _, _, matrix in self.experts[name].matrices(tensor))
        expected = self._expert_matrices(name)
        return all(rounds_to(f, w, p) for f, (w, p) in zip(found, expected, strict=True))

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """Tensor name in the file -> name in the model."""
        return {self.source.file_name(name): name for name in self.source.names()}

    @cached_property
    def _sites(self) -> Mapping[str, Site]:
        return {f"{site.path}.weight": site for site in self.sites}

    def _dtype_of(self, name: str) -> torch.dtype:
        own = self.source.entry(name).dtype
        is_kept = name.startswith(tuple(f"{path}." for path in self.others))
        return self.dtype if own.is_floating_point and not is_kept else own

    def _parts(self, name: str) -> list[LoraUpdate]:
        added = self._added
        layers = added.layers if added is not None else {}
        layer = layers.get(name.removesuffix(".weight"))
        return layer.read() if layer is not None else []

    def _adapts_experts(self, name: str) -> bool:
        return self.adapter is not None and self.experts[name].site.path in self.adapter.stacks

    def _expert_matrices(self, name: str) -> Iterator[tuple[Tensor, list[LoraUpdate]]]:
        """Yield (weight (rows, in) that the adapter is added to, updates) of each expert."""
        expert_tensor = self.experts[name]
        lora = self._stack_lora(expert_tensor.site.path) if self._adapts_experts(name) else None
        for expert, rows, matrix in expert_tensor.matrices(self.source.read(name)):
            weight = matrix
            if self.base == "dequantized":
                weight_format = self.base_format.of(expert_tensor.site)
                packed = pack_weight(weight_format, matrix.contiguous().to(self.device))
                weight = packed.dequantize().cpu()
            updates = []
            if lora is not None:
                every = slice(0, weight.shape[0])
                updates = [LoraUpdate(every, lora.a[expert], lora.b[expert, rows], lora.scaling)]
            yield weight, updates

    def _stack_lora(self, path: str) -> StackLora:
        """Return the adapters of a stack.

        Those of one module are kept in memory, because a file mixes its tensors.
        """
        assert self.adapter is not None
        if path not in self._read_stacks:
            module = path.rpartition(".")[0]
            for other in [key for key in self._read_stacks if key.rpartition(".")[0] != module]:
                del self._read_stacks[other]
            self._read_stacks[path] = self.adapter.stacks[path].read()
        return self._read_stacks[path]

    @cached_property
    def _read_stacks(self) -> dict[str, StackLora]:
        return {}

    def _base_weight(self, name: str, site: Site) -> Tensor:
        """Return the weight (out, in) that the adapter is added to."""
        if self.base == "original":
            return site.from_file(self.source.read(name))
        weight_format = self.base_format.of(site)
        layer = trained_weight(name, site, self.trained_source, weight_format, self.device)
        return layer.dequantize().cpu()

    def _copied(self, name: str, count: Count) -> Tensor:
        own = self.source.read(name)
        result = own.to(self._dtype_of(name))
        if result.dtype != own.dtype:
            count(own, result)
        return result

    def _sum(self, weight: Tensor, parts: Sequence[LoraUpdate], count: Count) -> Tensor:
        """Return the sum of a weight (out, in) and the updates, rounded to the output dtype."""
        result = torch.empty(weight.shape, dtype=self.dtype)
        for rows, total in merged_rows(weight, parts):
            result[rows] = total.float()
            count(total, result[rows])
        return result


def _ignore(before: Tensor, after: Tensor) -> None: ...


def _too_large(name: str, dtype: torch.dtype) -> VerificationFailed:
    dtype_text = dtype_name(dtype)
    return VerificationFailed(
        f"{name} has values that {dtype_text} cannot represent",
        hint=f"the largest {dtype_text} number is {torch.finfo(dtype).max:g}; merge with "
        f"--dtype {FALLBACK_DTYPE}",
    )
