"""The protocol of a placement: where a model's weights are while the model computes."""

from __future__ import annotations

from typing import Protocol

from qlora_cli.files.source import TensorSource
from qlora_cli.models.model import LoadedModel


class Placement(Protocol):
    """A way to give a converted model on `meta` its weights.

    `device.py` loads all weights onto one device; some blocks may then move to host memory and be
    copied back when they compute (`block_stream.py`). `disk.py` leaves them in the packed copy.
    `block_shards.py` gives each process of a job a part of these blocks. `streamed.py` reads the
    weights of a module from the checkpoint when the module computes, and frees them afterwards.
    """

    def place(self, loaded: LoadedModel, source: TensorSource) -> None:
        """Connect the model with the tensors of `source`.

        Raises ModelError if the names or shapes of the tensors are not those of the model.
        """
