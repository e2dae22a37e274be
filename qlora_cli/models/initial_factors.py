"""The factors that training begins with if `adapter.init` is not `default`.

By default B is 0, so the model begins as its packed base Q(W). The other methods begin with
factors B0, A0 whose product is not 0:

- `pissa` (Meng 2024): s B0 A0 is the best approximation of W of the adapter's rank, and the base
  is the packed residual Q(W - s B0 A0). Its values are smaller, and so is the error of packing.
- `loftq` (Li 2023, with one iteration): s B0 A0 is the best approximation of the error W - Q(W).
  The base is packed as by default.

The factors are computed weight by weight while the base is loaded, and kept in host memory: a
finished adapter states the change to W, which is s (B A - B0 A0) (`save_adapter.py`). A later start
reads them from the adapter, because another machine may round them differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.adapters.lora import Factors, LoraLinear
from qlora_cli.adapters.peft_file import AdapterFile
from qlora_cli.adapters.peft_initial import factors_of, half_of
from qlora_cli.errors import ModelError, Problem, ProblemsError
from qlora_cli.files.quantized import BITSANDBYTES, stored_as
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import attribute, host_memory, module_scope, scope
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.weight_store import host_copy, on_host
from qlora_cli.models.residual import ResidualSource
from qlora_cli.nn.embedding import upload
from qlora_cli.nn.low_rank import low_rank_factors
from qlora_cli.nn.packed_tensors import pack_weight
from qlora_cli.nn.site import Site
from qlora_cli.recipe.adapter import LOFTQ, PISSA
from qlora_cli.recipe.schema import Recipe


class InitialFactors:
    """Computes or reads the initial factors of the adapter of one model.

    loaded: with the adapter's layers, which have no factors yet. init: of the recipe. seed: of the
    computation. device: packs weights. adapter: has the factors; None to compute them.

    Raises ModelError if the base contains no unquantized weights, ProblemsError if a rank is too
    high.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        init: str,
        seed: int,
        device: torch.device,
        adapter: AdapterFile | None,
    ) -> None:
        if adapter is None and stored_as(loaded.config) == BITSANDBYTES:
            raise ModelError(
                f"adapter.init: {init} needs the original weights, and bitsandbytes quantized the "
                "checkpoint of this base",
                where="model.name",
                hint="use the model that it was made from, or adapter.init=default",
            )
        self._layers = dict(adapted_layers(loaded.model))
        _check_ranks(self._layers, init)
        self._sites = {site.path: site for site in loaded.sites if site.path in self._layers}
        self._loaded, self._init, self._seed, self._device = loaded, init, seed, device
        self._adapter = adapter

    @classmethod
    def of(
        cls, loaded: LoadedModel, recipe: Recipe, device: torch.device, adapter: AdapterFile | None
    ) -> InitialFactors | None:
        """Return the factors for a recipe; None if B begins as 0. Errors as of the class."""
        if not recipe.adapter.is_initialized:
            return None
        return cls(loaded, recipe.adapter.init, recipe.train.seed, device, adapter)

    @cached_property
    def _known(self) -> dict[str, dict[str, Factors]]:
        """Path -> role -> factors that were computed, or read from the adapter."""
        if self._adapter is None:
            return {}
        start = half_of(self._adapter, "initial").layers
        return {path: factors_of(start[path], site) for path, site in self._sites.items()}

    def source(self, source: TensorSource) -> TensorSource:
        """Return the source of the base: that of the residuals for PiSSA."""
        if self._init != PISSA:
            return source
        return ResidualSource(source, self._sites, self._of_weight, self._scaling)

    def start(self, source: TensorSource) -> None:
        """Set the adapter of the model to the factors. source: of the base's original weights."""
        for path, layer in self._layers.items():
            with scope("temporary"), module_scope(path), torch.no_grad():
                if path not in self._known:
                    assert self._init == LOFTQ
                    self._known[path] = self._of_error(path, source)
                layer.start_from(self._known.pop(path))

    def _scaling(self, path: str) -> float:
        return self._layers[path].settings.scaling

    def _of_weight(self, path: str, weight: Tensor) -> dict[str, Factors]:
        """Return the factors of PiSSA. weight: the original one (out, in), float32."""
        if path not in self._known:
            self._known[path] = self._factors(path, weight)
        return self._known[path]

    def _of_error(self, path: str, source: TensorSource) -> dict[str, Factors]:
        """Return the factors of LoftQ. source: of the base's original weights."""
        site, layer = self._sites[path], self._layers[path]
        if self._loaded.base_format.of(site).bits < 16:
            return self._factors(path, self._error(site, source))
        return {  # There is no error to begin with.
            role: Factors(_as_adapter(layer.lora_b[role]), _as_adapter(layer.lora_a[role]))
            for role in layer.lora_slices
        }

    def _factors(self, path: str, matrix: Tensor) -> dict[str, Factors]:
        """Return the factors of each role, with s B0 A0 close to its rows of `matrix`."""
        layer, found = self._layers[path], {}
        settings = layer.settings
        for role, rows in layer.lora_slices.items():
            with host_memory():
                b, a = low_rank_factors(matrix[rows], settings.rank, self._seed)
                root = settings.scaling**0.5
                factors = Factors((b / root).to(settings.dtype), (a / root).to(settings.dtype))
                del b, a
                attribute([factors.b, factors.a], "adapter")
            found[role] = factors
        return found

    def _error(self, site: Site, source: TensorSource) -> Tensor:
        """Return W - Q(W) (out, in) float32 in host memory."""
        with host_memory():
            weight = site.from_file(source.read(f"{site.path}.weight")).contiguous()
        packed = pack_weight(self._loaded.base_format.of(site), upload(weight, self._device))
        dequantized = on_host(packed.dequantize(), self._device)
        del packed
        with host_memory():
            error = weight.float()
            return error.sub_(dequantized)


def _as_adapter(parameter: Tensor) -> Tensor:
    with scope("adapter"):
        return host_copy(parameter.detach())


def _check_ranks(layers: dict[str, LoraLinear], init: str) -> None:
    """Raise ProblemsError if the rank of a role is larger than a side of its weight."""
    problems = [
        Problem(
            "adapter.rank",
            f"{layer.settings.rank} for {role} of {path}, which is a matrix of {rows} x "
            f"{layer.base.in_features}",
        )
        for path, layer in layers.items()
        for role, rows in _row_numbers(layer)
        if layer.settings.rank > min(rows, layer.base.in_features)
    ]
    if problems:
        raise ProblemsError(
            f"adapter.init: {init} needs ranks up to the smaller side of each weight", problems[:6]
        )


def _row_numbers(layer: LoraLinear) -> Sequence[tuple[str, int]]:
    return [(role, rows.stop - rows.start) for role, rows in layer.lora_slices.items()]
