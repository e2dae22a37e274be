"""The tensors of a checkpoint with weights of experts: whole stacks, or parts of one expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.models.family import Family
from qlora_cli.nn.experts import StackPart
from qlora_cli.nn.site import Site


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor with weights of experts.

    site: the stacked parameter. part: the part of it that the tensor has; None for all of it.
    """

    site: Site
    part: StackPart | None = None

    def matrices(self, tensor: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield (expert, its rows, their weights (rows, in)) of every expert in the tensor."""
        if self.part is None:
            for expert, matrix in enumerate(tensor):
                yield expert, slice(0, self.site.out_features), self.site.from_file(matrix)
            return
        half = self.site.out_features // 2
        start, stop = self.part.start, self.part.stop
        is_whole = stop - start == 2
        rows = slice(0, self.site.out_features) if is_whole else slice(start * half, stop * half)
        yield self.part.expert, rows, tensor

    def tensor(self, matrices: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the tensor of the file from the weights of `matrices`. dtype: theirs."""
        if self.part is not None:
            (only,) = matrices
            return only
        result = torch.empty((self.site.num_experts, *self.site.file_shape), dtype=dtype)
        for expert, matrix in enumerate(matrices):
            result[expert] = self.site.to_file(matrix)
        return result


def expert_tensors(stacks: Sequence[Site], family: Family) -> Mapping[str, ExpertTensor]:
    """Return name in the model -> tensor, of all tensors of a checkpoint with weights of experts.

    stacks: the stacked parameters of the model.
    """
    found: dict[str, ExpertTensor] = {}
    for site in stacks:
        parts = family.stacks.get(site.path, ())
        found |= {part.name: ExpertTensor(site, part) for part in parts}
        if not parts:
            found[site.path] = ExpertTensor(site)
    return found
