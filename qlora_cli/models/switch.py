"""Several adapters on one base, of which one is active. Switching does not load the base again.

Each adapter is stored as its layers (`LoraLinear`) around the linear layers of the base. It takes
the memory of its A and B only, and adapters may differ in rank, targets and scaling. Switching
replaces these layers in the model; no weight is copied.

With `merged`, the active adapter is added to the weights of a 16-bit base and its layers are
removed, so that inference is as fast as without an adapter (LoRA, section 4.1). Removing it must
restore the base's weights bit for bit. In 16 bit, W + BA - BA is not W, so W is read from the
checkpoint again. The alternative, a copy of the changed weights, would take 2 bytes of GPU memory
per weight of an adapted layer; the file exists in any case, and only a switch has to wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.adapters.adapted_modules import LoraModule, adapted_modules
from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.adapters.peft_file import AdapterFile
from qlora_cli.errors import ModelError, QloraError, UsageError
from qlora_cli.files.source import FolderSource
from qlora_cli.models.attach import adapter_layers_for, set_adapter_layers
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.prefix import block_prefixes
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.recipe.suggest import nearest_word

BASE = "base"
"""The name that selects the base without an adapter."""
OWN = "run"
"""The name of the opened run's own adapter."""


class AdapterSwitch:
    """The adapters of one model by name, of which at most one is active.

    loaded: a model for inference. If it has an adapter, that becomes the adapter `run` and is
        active.
    source: the source of the base's weights.
    merged: add the active adapter to the weights instead of computing it separately.

    Raises UsageError if `merged` is set and the base is quantized or in host memory.
    """

    def __init__(self, loaded: LoadedModel, source: FolderSource, *, merged: bool = False) -> None:
        if merged and loaded.base_format.is_quantized:
            raise UsageError(
                f"an adapter cannot be added to the weights of a {loaded.base_format.text} base",
                where="--merged",
                hint="omit it, or open the 16-bit model with the run as --adapter NAME=RUN",
            )
        if merged and loaded.is_residual:
            raise UsageError(
                "an adapter cannot be added to the residual that adapter.init: pissa trains on",
                where="--merged",
                hint="omit it, or open the 16-bit model with the run as --adapter NAME=RUN",
            )
        if merged and loaded.stream is not None:
            raise UsageError(
                "an adapter cannot be added to weights in host memory (base.residency)",
                where="--merged",
                hint="omit it, or merge the run with `qlora merge`",
            )
        if merged and block_prefixes(loaded.model):
            raise UsageError(
                "a prefix (adapter.prefix) cannot be added to weights",
                where="--merged",
                hint="omit it",
            )
        self._loaded = loaded
        self._source = source
        self._stamps = {entry.file: _stamp(entry.file) for entry in source.entries.values()}
        self._is_merged = merged
        self._changed: dict[str, QuantLinear] = {}
        self._layers: dict[str, dict[str, LoraModule]] = {BASE: {}}
        self.current = BASE
        own = dict(adapted_modules(loaded.model))
        if own:
            self._layers[OWN] = own
            self.use(OWN)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Return the names of the adapters in the order in which they were added."""
        return tuple(name for name in self._layers if name != BASE)

    def add(self, name: str, adapter: AdapterFile) -> None:
        """Load an adapter in addition to the others. The active adapter does not change.

        Raises UsageError if the name is taken or the base is a residual, ProblemsError if the
        adapter does not fit the base.
        """
        if name in (BASE, OWN) or name in self._layers:
            raise UsageError(
                f"the name {name!r} is taken",
                where="--adapter",
                hint=f"{BASE} is the base without an adapter, {OWN} the adapter of the opened run",
            )
        if self._loaded.is_residual:
            raise UsageError(
                "the base of this run is a residual (adapter.init: pissa), so it takes no other "
                "adapter",
                where="--adapter",
                hint="open the model that the run was trained on, with the run as --adapter "
                "NAME=RUN",
            )
        if adapter.prefix is not None or block_prefixes(self._loaded.model):
            where = "the adapter" if adapter.prefix is not None else "the opened run"
            raise UsageError(
                f"{where} has a prefix (adapter.prefix), which is not switched",
                where="--adapter",
                hint="open the run with the prefix on its own",
            )
        self._layers[name] = adapter_layers_for(self._loaded, adapter)

    def check(self, name: str) -> None:
        """Raise UsageError if there is no adapter with this name."""
        check_adapter_name(name, list(self._layers))

    def use(self, name: str) -> None:
        """Make this adapter active; `base` for none.

        Raises UsageError if there is no adapter with this name or if it would be merged and adapts
        experts, QloraError if a merged weight
        overflows (the base is then active), ModelError if the base's file has changed since loading
        (the model must then be opened again).
        """
        self.check(name)
        stacks = [m for m in self._layers[name].values() if not isinstance(m, LoraLinear)]
        if self._is_merged and stacks:
            raise UsageError(
                f"the adapter {name!r} adapts experts, which cannot be added to loaded weights",
                where="--merged",
                hint="omit it, or merge the run with `qlora merge`",
            )
        self._restore()
        set_adapter_layers(self._loaded, {})
        self.current = BASE
        if self._is_merged:
            self._merge(name)
        else:
            set_adapter_layers(self._loaded, self._layers[name])
        self.current = name

    @torch.no_grad()
    def _merge(self, name: str) -> None:
        """Add an adapter to the weights of the base. Raises QloraError if a weight overflows."""
        for path, layer in self._layers[name].items():
            assert isinstance(layer, LoraLinear)
            weight = layer.base.weight
            merged = (weight.float() + layer.delta()).to(weight.dtype)
            if not merged.isfinite().all():
                self._restore()
                raise QloraError(
                    f"{path}: with the adapter {name!r} it has values beyond {weight.dtype}",
                    hint="omit --merged",
                )
            self._changed[path] = layer.base
            layer.base.pack(merged)

    def _restore(self) -> None:
        """Read each changed weight again, so that it is bit for bit as it was loaded."""
        sites = {site.path: site for site in self._loaded.sites}
        for path, linear in list(self._changed.items()):
            weight = self._read_again(f"{path}.weight").to(linear.weight.device)
            linear.pack(sites[path].from_file(weight))
            del self._changed[path]

    def _read_again(self, name: str) -> Tensor:
        file = self._source.entry(name).file
        try:
            if _stamp(file) == self._stamps[file]:
                return self._source.read(name)
            reason = "it has changed since it was loaded"
        except OSError as error:
            reason = error.strerror or str(error)
        raise ModelError(
            f"the base cannot be read again: {reason}",
            where=str(file),
            hint="open the model again",
        )


def check_adapter_name(name: str, names: Sequence[str]) -> None:
    """Raise UsageError if `name` is not one of `names`, which include `base`."""
    if name not in names:
        raise UsageError(
            f"there is no adapter {name!r}",
            hint=nearest_word(name, list(names)) or f"valid names: {', '.join(names)}",
        )


def _stamp(file: Path) -> tuple[int, int]:
    """Return size and modification time of a file, which change if it is written again."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
