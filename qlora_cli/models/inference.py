"""Makes a loaded model generate faster, one token at a time.

The product of one token reads each weight once, so dequantizing the weight for it costs more than
the product itself.
"""

from __future__ import annotations

import torch

from qlora_cli.events import Observer
from qlora_cli.memory.host import available_bytes, fits
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.units import format_bytes


def prepare_generation(loaded: LoadedModel, device: torch.device, observer: Observer) -> None:
    """Prepare the packed linears of a model for inference.

    On a CPU each weight is dequantized once, if the copies fit the free memory; every product gives
    the same bits as before. On a GPU the weights stay packed, and bitsandbytes' fused kernel
    multiplies single tokens by 4-bit weights, which rounds differently. The observer gets a note
    with the size of the copies.
    """
    if loaded.stream is not None:
        observer.note(
            f"the weights of {loaded.stream.num_blocks} blocks are copied to the device for every "
            "token (base.residency), which is slow"
        )
        return
    linears = [module for module in loaded.model.modules() if isinstance(module, QuantLinear)]
    if device.type != "cpu":
        for linear in linears:
            linear.fuse_token_product()
        return
    num_bytes = sum(linear.dequantized_bytes for linear in linears)
    if not num_bytes:
        return
    dtype = str(loaded.base_format.compute).removeprefix("torch.")
    size = format_bytes(num_bytes)
    if not fits(num_bytes, device):
        free = format_bytes(available_bytes(device))
        observer.note(
            f"every token dequantizes the weights again, which is slow: a copy in {dtype} needs "
            f"{size}, and {free} of memory are free"
        )
        return
    for linear in linears:
        if linear.dequantized_bytes:
            linear.keep_dequantized()
    observer.note(f"the weights are also kept in {dtype}, which needs {size} more memory")
