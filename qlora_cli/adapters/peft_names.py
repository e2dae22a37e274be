"""The names of the tensors in an adapter's file, as PEFT writes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.files.safetensors_io import TensorEntry

PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
_TENSOR_NAME = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")


def tensor_name(path: str, factor: str) -> str:
    """Return the name of a tensor in the file: `base_model.model.<path>.lora_A.weight`.

    path: the linear layer. factor: `A` or `B`.
    """
    return f"{PREFIX}{path}.lora_{factor}.weight"


def saved_name(name: str) -> str:
    """Return the name in the file of a parameter of a module in `modules_to_save`."""
    return f"{PREFIX}{name}"


def parse_saved_name(name: str, modules: Collection[str]) -> str | None:
    """Return the parameter's name of a tensor that is saved whole, or None for another tensor.

    modules: `modules_to_save`, paths or their endings.
    """
    parameter = name.removeprefix(PREFIX)
    parts = parameter.split(".")
    paths = (f".{'.'.join(parts[:end])}" for end in range(1, len(parts)))
    is_saved = any(path.endswith(f".{module}") for path in paths for module in modules)
    return parameter if name.startswith(PREFIX) and is_saved else None


def magnitude_name(path: str) -> str:
    """Return the name in the file of DoRA's magnitude vector of the linear layer at `path`."""
    return f"{PREFIX}{path}.{_MAGNITUDE}"


def parse_magnitude_name(name: str) -> str | None:
    """Return the path of the linear layer of a magnitude vector, None for another tensor."""
    is_magnitude = name.startswith(PREFIX) and name.endswith(f".{_MAGNITUDE}")
    return name.removeprefix(PREFIX).removesuffix(f".{_MAGNITUDE}") if is_magnitude else None


def parse_tensor_name(name: str) -> tuple[str, str] | None:
    """Return (path of the linear layer, `A` or `B`), or None if `name` has another form."""
    match = _TENSOR_NAME.fullmatch(name)
    return (match["path"], match["factor"]) if match else None


def factor_pairs(
    entries: Mapping[str, TensorEntry], file: Path
) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """Return path -> (entry of A, entry of B).

    Raises ModelError if the file has no tensors, a tensor with another name, or an A without B.
    """
    if not entries:
        raise ModelError(
            f"an empty adapter: a file of {file.stat().st_size} bytes without a tensor",
            where=str(file),
            hint="the program that saved it did not write the weights; save it again",
        )
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        parsed = parse_tensor_name(name)
        if parsed is None:
            raise ModelError(
                f"{name} is not a LoRA factor",
                where=str(file),
                hint=f"expected: {tensor_name('<path of the linear layer>', 'A')}",
            )
        path, factor = parsed
        pairs.setdefault(path, {})[factor] = entry
    for path, factors in pairs.items():
        if len(factors) != 2:
            raise ModelError(f"{path} has lora_{next(iter(factors))} alone", where=str(file))
    return {path: (factors["A"], factors["B"]) for path, factors in pairs.items()}
