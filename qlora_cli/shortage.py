"""Convert errors about memory and about the GPU, of any library, to the package's own errors.

This module imports no torch: its errors are recognized by their names and messages.
"""

from __future__ import annotations

from qlora_cli.errors import DoesNotFit, QloraError

_GPU_MESSAGES = ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
_HOST_MESSAGES = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
_GPU_FAULTS = ("CUDA error", "CUBLAS_STATUS", "cuBLAS error", "CUDNN_STATUS")


def converted(error: Exception) -> Exception:
    """Return the package's own error for a foreign one about memory or the GPU, else `error`."""
    if isinstance(error, QloraError):
        return error
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or _has(text, _GPU_MESSAGES):
        return DoesNotFit(
            f"the GPU is out of memory: {text}",
            hint="find a size that fits with `qlora plan --fit`; check that no other process uses "
            "the GPU",
        )
    if isinstance(error, MemoryError) or _has(text, _HOST_MESSAGES):
        return DoesNotFit(
            f"the computer is out of memory: {text}",
            hint="end other programs, or use a smaller model or shorter sequences",
        )
    if _has(text, _GPU_FAULTS):
        return QloraError(
            f"the GPU reported an error: {text}",
            hint="run again with CUDA_LAUNCH_BLOCKING=1 to see the operation; if it fails again, "
            "check the driver with nvidia-smi",
        )
    return error


def _has(text: str, parts: tuple[str, ...]) -> bool:
    return any(part in text for part in parts)
