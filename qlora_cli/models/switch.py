"""Several adapters on one base: which of them answers changes without loading the base again.

Each adapter is kept as its layers over the base's own linears (`LoraLinear`), so that it costs its
A and B and no more, and adapters may differ in rank, targets and scaling. To switch is to put
other layers in these places; no weight moves.

Merged, an adapter is added into the weights of a 16-bit base and the layers are left out, so that
answering costs what it costs without an adapter (LoRA, section 4.1). Taking it out again must give
the base's bytes. W + BA - BA is not W in 16 bit, so W is read from the checkpoint again. The other
way, a copy of what is changed, takes 2 bytes for each weight of an adapted linear, on the device,
where memory is the scarce thing; the file is there anyway, and only a switch waits for it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.adapters.lora import LoraLinear, adapted_layers
from qlora_cli.adapters.peft_file import AdapterFile
from qlora_cli.errors import ModelError, QloraError, UsageError
from qlora_cli.files.source import FolderSource
from qlora_cli.models.attach import adapter_layers_for, set_adapter_layers
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.recipe.suggest import nearest_word

BASE = "base"
"""Name of the base without an adapter."""
OWN = "run"
"""Name of the adapter that a run brings with it."""


class AdapterSwitch:
    """The adapters of one model by name, of which at most one is in place.

    built: a model for answering. source: where its weights were read from. merged: an adapter in
    place is added into the weights. Raises UsageError where the base cannot be merged into.
    """

    def __init__(self, loaded: LoadedModel, source: FolderSource, *, merged: bool = False) -> None:
        if merged and loaded.weight_format.bits != 16:
            raise UsageError(
                f"an adapter cannot be added into the weights of a {loaded.weight_format.bits}-bit base",
                where="--merged",
                hint="leave it out, or name the 16-bit model with the run as --adapter NAME=RUN",
            )
        self._built = loaded
        self._source = source
        self._stamps = {entry.file: _stamp(entry.file) for entry in source.entries.values()}
        self._merges = merged
        self._changed: dict[str, QuantLinear] = {}
        self._layers: dict[str, dict[str, LoraLinear]] = {BASE: {}}
        self.current = BASE
        own = dict(adapted_layers(loaded.model))
        if own:
            self._layers[OWN] = own
            self.use(OWN)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they came."""
        return tuple(name for name in self._layers if name != BASE)

    def add(self, name: str, adapter: AdapterFile) -> None:
        """Loads an adapter beside the others; what answers stays.

        Raises UsageError where the name is taken, ProblemsError where the adapter does not fit.
        """
        if name in (BASE, OWN) or name in self._layers:
            raise UsageError(
                f"the name {name!r} is taken",
                where="--adapter",
                hint=f"{BASE} is the base alone, {OWN} the adapter that a run brings with it",
            )
        self._layers[name] = adapter_layers_for(self._built, adapter)

    def check(self, name: str) -> None:
        """Raises UsageError where there is no adapter of that name."""
        if name not in self._layers:
            loaded = f"there are {', '.join(self._layers)}"
            raise UsageError(
                f"there is no adapter {name!r}",
                hint=nearest_word(name, list(self._layers)) or loaded,
            )

    def use(self, name: str) -> None:
        """Puts this adapter in place of the one before; `base` for none.

        Raises UsageError where there is none of that name and QloraError where merging overflows,
        which leaves the base alone in place; ModelError where the base's file is not what it was,
        and then the model must be opened anew.
        """
        self.check(name)
        self._restore()
        set_adapter_layers(self._built, {})
        self.current = BASE
        if self._merges:
            self._merge(name)
        else:
            set_adapter_layers(self._built, self._layers[name])
        self.current = name

    @torch.no_grad()
    def _merge(self, name: str) -> None:
        for path, layer in self._layers[name].items():
            weight = layer.base.weight
            merged = (weight.float() + layer.delta()).to(weight.dtype)
            if not merged.isfinite().all():
                self._restore()
                raise QloraError(
                    f"{path}: with the adapter {name!r} it has values beyond {weight.dtype}",
                    hint="leave out --merged",
                )
            self._changed[path] = layer.base
            layer.base.pack(merged)

    def _restore(self) -> None:
        """Each changed weight as it was loaded, bit for bit: read and packed in the same way."""
        sites = {site.path: site for site in self._built.sites}
        for path, linear in list(self._changed.items()):
            weight = self._read_again(f"{path}.weight").to(linear.weight.device)
            linear.pack(sites[path].from_file(weight))
            del self._changed[path]

    def _read_again(self, name: str) -> Tensor:
        file = self._source.entry(name).file
        try:
            if _stamp(file) == self._stamps[file]:
                return self._source.read(name)
            fault = "it was written anew since it was loaded"
        except OSError as refused:
            fault = refused.strerror or str(refused)
        raise ModelError(
            f"the base cannot be read again: {fault}", where=str(file), hint="open the model anew"
        )


def _stamp(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns
