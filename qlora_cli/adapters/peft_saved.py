"""The names of parameters that PEFT saves whole, of the modules in `modules_to_save`."""

from __future__ import annotations

from collections.abc import Collection

from qlora_cli.adapters.peft_config import PREFIX


def saved_name(name: str) -> str:
    """Return the name in the file of a parameter that is saved whole."""
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
