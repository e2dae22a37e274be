"""How many bytes the instrument's own records take on the host."""

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
_ROOM = __name__.rpartition(".")[0]


def record_bytes(*roots: Any) -> int:
    """Of these objects and all records that they are made of, each counted once.

    Records are numbers, text, containers, closures and objects of this room. What they watch
    (tensors, modules, the device) is not followed and not counted.
    """
    seen: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) not in seen and _is_record(one):
            seen[id(one)] = one
            waiting += _held_by(one)
    return sum(map(sys.getsizeof, seen.values()))


def _is_record(one: Any) -> bool:
    if isinstance(one, type):
        return False
    return isinstance(one, (*_LEAVES, *_CONTAINERS, FunctionType)) or (
        type(one).__module__.startswith(_ROOM)
    )


def _held_by(one: Any) -> list[Any]:
    if isinstance(one, FunctionType):
        return list(one.__closure__ or ())  # Its globals are the program, not a record.
    return [] if isinstance(one, _LEAVES) else gc.get_referents(one)
