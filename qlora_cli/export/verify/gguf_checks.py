"""Check the GGUF files in a merged folder against its tensors.

A float16 or Q8_0 file that merging wrote is compared value by value (`gguf/read_back.py`). A tensor
in another encoding, such as Q4_K, is unpacked, and its error relative to the merged tensor must be
that of the encoding. Without the package `gguf`, only a file's first bytes are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from qlora_cli.errors import QloraError
from qlora_cli.events import Observer

_MAGIC = b"GGUF"
_HEADER_BYTES = 24
"""Magic, version, number of tensors and number of metadata entries."""


def gguf_file_faults(merged: Path, *, can_compare: bool, observer: Observer) -> Iterator[str]:
    """Yield a line for each fault of a GGUF file in a merged folder.

    merged: the merged folder. can_compare: whether the folder's tensors form a model, so that the
    file's tensors can be compared with them. observer: receives a note on what cannot be compared.
    """
    for file in sorted(merged.glob("*.gguf")):
        fault = _header_fault(file)
        if fault:
            yield f"{file.name} {fault}; remove it and merge again with --gguf"
        elif find_spec("gguf") is None:
            observer.note(
                f"{file.name} is not compared with the merged tensors, because the gguf package is "
                "not installed: pip install 'qlora-cli[gguf]'"
            )
        elif can_compare:
            for fault in _value_faults(merged, file, observer):
                yield f"{file.name}: {fault}"


def _header_fault(file: Path) -> str | None:
    if not file.is_file():
        return "is not a file"
    with file.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
    if not header:
        return "is empty"
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        return "is not a GGUF file"
    return None


def _value_faults(merged: Path, file: Path, observer: Observer) -> Iterator[str]:
    from qlora_cli.export.gguf.plan import GgufPlan
    from qlora_cli.export.gguf.quantized import quantized_faults
    from qlora_cli.export.gguf.read_back import gguf_faults
    from qlora_cli.export.gguf.write import encoding_of

    encoding = encoding_of(file)
    try:
        plan = GgufPlan(merged, encoding or "f16")
        check = gguf_faults if encoding else quantized_faults
        yield from check(file, plan, observer)
    except QloraError as fault:
        yield f"it cannot be compared with the merged tensors: {fault.what}"
