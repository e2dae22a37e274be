"""`qlora doctor`: try out what works on this machine. Does not use the network."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from qlora_cli.jobs.results import Check, DoctorResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.recipe.base import Bits
from qlora_cli.units import GIB, format_bytes

_LIBRARIES = ("torch", "bitsandbytes", "transformers", "accelerate", "safetensors", "datasets")
_SMALL_DISK = 20 * GIB
"""With less free space, the merged copy of an 8B base does not fit."""


def run() -> DoctorResult:
    """Check the device, its memory, quantization on it, the disk and the library versions."""
    return DoctorResult(checks=tuple(_checks()))


def _checks() -> Iterator[Check]:
    kind = inspect_device().kind
    device = torch.device(kind)
    yield _device()
    yield _memory()
    yield _attempt("4 bit (NF4)", lambda: _quantize(4, device))
    yield _attempt("8 bit (LLM.int8())", lambda: _quantize(8, device))
    yield _paged_optimizers(kind)
    yield _disk()
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for library in _LIBRARIES:
        yield _version(library)


def _device() -> Check:
    profile = inspect_device()
    if profile.capability is not None:
        capability = "{}.{}".format(*profile.capability)
        detail = f"{profile.name}, compute capability {capability}, CUDA {torch.version.cuda}"
        if profile.capability >= (8, 0):
            return Check("device", "ok", detail)
        return Check("device", "limited", detail, "this GPU has no bfloat16 units; float16 is used")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        hint = "install a CUDA build of torch: https://pytorch.org/get-started"
        return Check("device", "missing", "there is an NVIDIA GPU, but torch is a CPU build", hint)
    detail = f"{profile.name}, {torch.get_num_threads()} threads; no CUDA GPU"
    return Check("device", "limited", detail, "small models can be trained; an 8B base needs a GPU")


def _memory() -> Check:
    profile = inspect_device()
    detail = format_bytes(profile.capacity_bytes)
    if profile.kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        detail = f"{format_bytes(free)} of {detail} free"
    return Check("memory", "ok", detail)


def _attempt(name: str, measure_error: Callable[[], float]) -> Check:
    """Check that a quantizer runs. measure_error: uses it and returns its relative error."""
    try:
        error = measure_error()
    except Exception as failure:  # Any error of a driver or a library is a result of this check.
        reason = str(failure).strip().splitlines() or [type(failure).__name__]
        return Check(name, "missing", reason[0], "base.bits=16 works without it")
    return Check(
        name, "ok", f"works; {error:.1%} relative error of a matrix product with Gaussian weights"
    )


def _quantize(bits: Bits, device: torch.device) -> float:
    """Quantize a Gaussian weight, run forward and backward; return the output's relative error."""
    from qlora_cli.nn.packing import WeightFormat
    from qlora_cli.nn.quant import QuantLinear

    weight, x = torch.randn(64, 64, device=device), torch.randn(32, 64, device=device)
    layer = QuantLinear(64, 64, False, WeightFormat(bits, torch.float32, torch.float32))
    layer.pack(weight)
    y = layer(x.requires_grad_())
    torch.autograd.grad(y.sum(), x)
    y, exact = y.detach(), x.detach() @ weight.t()
    return float((y - exact).norm() / exact.norm())


def _paged_optimizers(kind: str) -> Check:
    if kind == "cuda":
        return Check("paged AdamW", "ok", "there is a CUDA GPU")
    hint = "train.optimizer=adamw and adamw8bit work on every device"
    return Check("paged AdamW", "limited", "needs a CUDA GPU", hint)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{format_bytes(free)} free in this folder"
    if free >= _SMALL_DISK:
        return Check("disk", "ok", detail)
    return Check("disk", "limited", detail, "a merged 8B model needs 15 GiB")


def _version(library: str) -> Check:
    try:
        return Check(library, "ok", importlib.metadata.version(library))
    except importlib.metadata.PackageNotFoundError:
        return Check(library, "missing", "not installed", f"pip install {library}")
