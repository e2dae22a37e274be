"""The host memory that the instrument's own records use."""

from __future__ import annotations

import gc
import sys
from array import array
from collections import deque
from types import CellType, FunctionType
from typing import Any
from weakref import ReferenceType

_LEAVES = (int, float, str)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, array, ReferenceType, CellType)
_PACKAGE = __name__.rpartition(".")[0]


def record_bytes(*roots: Any) -> int:
    """Return the size in bytes of these objects and all records they refer to, each counted once.

    Records are numbers, text, containers, closures and objects of classes of `qlora_cli.memory`.
    Other objects that they refer to (tensors, modules, the device) are not counted.
    """
    counted: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if id(value) not in counted and _is_record(value):
            counted[id(value)] = value
            waiting += _references(value)
    return sum(map(sys.getsizeof, counted.values()))


def _is_record(value: Any) -> bool:
    if isinstance(value, type):
        return False
    return isinstance(value, (*_LEAVES, *_CONTAINERS, FunctionType)) or (
        type(value).__module__.startswith(_PACKAGE)
    )


def _references(value: Any) -> list[Any]:
    if isinstance(value, FunctionType):
        return list(value.__closure__ or ())  # The globals of a function belong to the program.
    return [] if isinstance(value, _LEAVES) else gc.get_referents(value)
