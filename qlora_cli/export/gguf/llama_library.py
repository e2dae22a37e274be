"""Load llama.cpp through the package llama-cpp-python, without its log messages."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from qlora_cli.errors import UsageError


def require_llama_cpp(what: str, where: str = "--gguf") -> None:
    """Raise UsageError if llama-cpp-python is not installed.

    what: what needs it, the beginning of the message. where: the option that asked for it.
    """
    if find_spec("llama_cpp") is None:
        raise UsageError(
            f"{what} needs llama-cpp-python, which is not installed",
            where=where,
            hint="pip install 'qlora-cli[llama]' (compiles llama.cpp, which needs a C++ compiler)",
        )


@cache
def llama_cpp() -> ModuleType:
    """Return the module llama_cpp. Its log messages are dropped from now on."""
    module = import_module("llama_cpp")

    callback = module.llama_log_callback(_ignore)
    module.llama_log_set(callback, ctypes.c_void_p(0))
    _CALLBACKS.append(callback)
    return module


def _ignore(level: int, text: bytes, user_data: object) -> None:
    pass


_CALLBACKS: list[object] = []
"""llama.cpp keeps a pointer to the callback, so it must not be freed."""
