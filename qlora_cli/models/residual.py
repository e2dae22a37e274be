"""The base that an adapter with `adapter.init: pissa` is trained on: W - s B0 A0 in place of W."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qlora_cli.adapters.lora import Factors
from qlora_cli.adapters.peft_file import AdapterFile
from qlora_cli.adapters.peft_initial import factors_of
from qlora_cli.files.source import TensorSource
from qlora_cli.nn.site import Site


def residual_source(
    source: TensorSource, start: AdapterFile, sites: Iterable[Site]
) -> ResidualSource:
    """Return the base that a stored adapter was trained on.

    start: the factors at the start of its training. sites: the linears of the model.
    """
    adapted = {site.path: site for site in sites if site.path in start.layers}
    return ResidualSource(
        source,
        adapted,
        lambda path, _: factors_of(start.layers[path], adapted[path]),
        lambda path: start.layers[path].settings.scaling,
    )


class ResidualSource:
    """The tensors of a base, with the residual in place of the weight of each adapted linear.

    base: the original tensors. sites: path -> adapted linear. factors_of: returns role -> factors
    for (path, weight (out, in) float32). scaling_of: returns s for a path.
    """

    def __init__(
        self,
        base: TensorSource,
        sites: Mapping[str, Site],
        factors_of: Callable[[str, Tensor], Mapping[str, Factors]],
        scaling_of: Callable[[str], float],
    ) -> None:
        self._base = base
        self._sites = {f"{path}.weight": site for path, site in sites.items()}
        self._factors_of, self._scaling_of = factors_of, scaling_of

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape in the file."""
        return self._base.shape(name)

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Return a tensor in the file's orientation; a residual is in float32."""
        site = self._sites.get(name)
        if site is None:
            return self._base.read(name)
        weight = site.from_file(self._base.read(name)).float()
        scaling = self._scaling_of(site.path)
        for role, factors in self._factors_of(site.path, weight).items():
            rows = weight[site.rows[role]]
            rows.addmm_(factors.b.float(), factors.a.float(), alpha=-scaling)
        return site.to_file(weight)
