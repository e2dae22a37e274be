"""One linear layer, or one stack of experts, and the orientation of its weight in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Site:
    """One linear layer, or one stacked parameter of experts, that the model's family describes.

    path: path of the module, `model.layers.0.self_attn.q_proj`. roles: the layer's roles, several
    for a fused projection. rows: each role's rows of the weight (out, in). bias: whether the layer
    has a bias. transposed: the file stores the weight as (in, out). Use `from_file`, `to_file` and
    `file_shape` instead of this flag.
    num_experts: 0 for a linear; else `path` is that of a stacked parameter, and everything else
    describes the matrix of one expert.
    """

    path: str
    roles: tuple[str, ...]
    rows: Mapping[str, slice]
    in_features: int
    out_features: int
    bias: bool
    transposed: bool
    num_experts: int = 0

    @property
    def file_shape(self) -> tuple[int, int]:
        """Return the shape of the weight in a checkpoint file."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def from_file(self, tensor: Tensor) -> Tensor:
        """Return the weight (out, in) from the tensor of a file: the tensor itself or a view."""
        return tensor.t() if self.transposed else tensor

    def to_file(self, weight: Tensor) -> Tensor:
        """Return the tensor that a file stores for the weight (out, in), contiguous."""
        return weight.t().contiguous() if self.transposed else weight
