"""What works on this machine: tried, not guessed. No network is asked."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from qlora_cli.jobs.results import Check, DoctorResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.recipe.schema import Bits
from qlora_cli.units import GIB, format_bytes

_LIBRARIES = ("torch", "bitsandbytes", "transformers", "accelerate", "safetensors", "datasets")
_SMALL_DISK = 20 * GIB
"""Less than this holds no 8B base with its merged copy."""


def run() -> DoctorResult:
    """Tries the device, its memory, the quantizers on it, and looks at disk and versions."""
    return DoctorResult(checks=tuple(_checks()))


def _checks() -> Iterator[Check]:
    facts = inspect_device()
    device = torch.device(facts.kind)
    yield _device()
    yield _memory()
    yield _attempt("4 bit (NF4)", lambda: _quantize(4, device))
    yield _attempt("8 bit (LLM.int8())", lambda: _quantize(8, device))
    yield _paged_optimizers(facts.kind)
    yield _disk()
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for library in _LIBRARIES:
        yield _version(library)


def _device() -> Check:
    facts = inspect_device()
    if facts.capability is not None:
        capability = "{}.{}".format(*facts.capability)
        detail = f"{facts.name}, compute capability {capability}, CUDA {torch.version.cuda}"
        if facts.capability >= (8, 0):
            return Check("device", "ok", detail)
        return Check("device", "limited", detail, "no bfloat16 units: float16 is used")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        hint = "install a CUDA build of torch: https://pytorch.org/get-started"
        return Check("device", "missing", "there is a card, and torch is a CPU build", hint)
    detail = f"{facts.name}, {torch.get_num_threads()} threads; no CUDA card"
    return Check("device", "limited", detail, "small models train; an 8B base needs a card")


def _memory() -> Check:
    facts = inspect_device()
    detail = format_bytes(facts.capacity_bytes)
    if facts.kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        detail = f"{format_bytes(free)} of {detail} free"
    return Check("memory", "ok", detail)


def _attempt(name: str, try_it: Callable[[], float]) -> Check:
    try:
        error = try_it()
    except Exception as failure:  # Whatever a driver or a library does here is the finding.
        reason = str(failure).strip().splitlines() or [type(failure).__name__]
        return Check(name, "missing", reason[0], "base.bits=16 works without it")
    return Check(name, "ok", f"works; the product with a Gaussian matrix is {error:.1%} off")


def _quantize(bits: Bits, device: torch.device) -> float:
    """Packs a Gaussian weight, multiplies and differentiates; the product's relative error."""
    from qlora_cli.nn.quant import QuantLinear, WeightFormat

    weight, x = torch.randn(64, 64, device=device), torch.randn(32, 64, device=device)
    layer = QuantLinear(64, 64, False, WeightFormat(bits, torch.float32, torch.float32))
    layer.pack(weight)
    y = layer(x.requires_grad_())
    torch.autograd.grad(y.sum(), x)
    y, exact = y.detach(), x.detach() @ weight.t()
    return float((y - exact).norm() / exact.norm())


def _paged_optimizers(kind: str) -> Check:
    if kind == "cuda":
        return Check("paged AdamW", "ok", "there is a CUDA card")
    hint = "train.optimizer=adamw and adamw8bit work everywhere"
    return Check("paged AdamW", "limited", "its states move between a card and the host", hint)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{format_bytes(free)} free in this folder"
    if free >= _SMALL_DISK:
        return Check("disk", "ok", detail)
    return Check("disk", "limited", detail, "a merged 8B model takes 15 GiB")


def _version(library: str) -> Check:
    try:
        return Check(library, "ok", importlib.metadata.version(library))
    except importlib.metadata.PackageNotFoundError:
        return Check(library, "missing", "not installed", f"pip install {library}")
