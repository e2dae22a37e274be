"""Bases whose checkpoint is already quantized: which are read, and what to use otherwise."""

from __future__ import annotations

from typing import Any

from qlora_cli.errors import ModelError

KEY = "quantization_config"
MXFP4 = "mxfp4"
BITSANDBYTES = "bitsandbytes"
STORED_AS = "_stored_as"
"""Attribute of a config with the format of its checkpoint."""
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "torchao": "torchao",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "bitnet": "BitNet",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "fbgemm_fp8": "FBGEMM FP8",
    "auto-round": "AutoRound",
}


def check_readable(content: dict[str, Any], file: str) -> str | None:
    """Return the name of the format of a quantized checkpoint that can be read; None for 16 bit.

    content: the parsed config.json. file: where it was read. Raises ModelError for another format.
    """
    settings = content.get(KEY)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method in (MXFP4, BITSANDBYTES):
        return str(method)
    name = _NAMES.get(str(method), str(method)) if method else "an unnamed format"
    raise ModelError(
        f"this base is already quantized ({name}), and its weights cannot be read",
        where=file,
        hint="name the 16-bit model that it was quantized from, which its card names; qlora "
        "quantizes while loading. Of quantized bases only MXFP4 and bitsandbytes are read",
    )


def mark(config: Any, stored_as: str | None) -> None:
    """Record in a config the format of its checkpoint."""
    if stored_as is not None:
        config.__dict__[STORED_AS] = stored_as


def stored_as(config: Any) -> str | None:
    """Return the format of a config's checkpoint; None for 16 bit."""
    found: str | None = vars(config).get(STORED_AS)
    return found
