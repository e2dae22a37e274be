"""Compare the tensors of a GGUF file with a plan: names, shapes, and values by a given check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gguf import GGUFReader, ReaderTensor

from qlora_cli.events import Observer
from qlora_cli.export.gguf.model import PlannedTensor
from qlora_cli.export.gguf.plan import GgufPlan

_READ_ERRORS = (ValueError, IndexError, KeyError, OverflowError)
"""What `GGUFReader` raises for a damaged file."""

MetadataFaults = Callable[[GGUFReader], Iterable[str]]
"""Yields one line for each fault of a file's metadata."""


def no_metadata_faults(reader: GGUFReader) -> Iterable[str]:
    """Accept any metadata."""
    return ()


def tensor_faults(
    file: Path,
    plan: GgufPlan,
    observer: Observer,
    value_faults: Callable[[PlannedTensor, ReaderTensor], Iterable[str]],
    metadata_faults: MetadataFaults = no_metadata_faults,
) -> Iterator[str]:
    """Yield one line for each difference between a GGUF file and a plan.

    observer: receives the number of compared tensors. value_faults: yields the lines for the values
    of one tensor of the planned shape. metadata_faults: yields those for the file's metadata.
    """
    try:
        reader = GGUFReader(file)
    except _READ_ERRORS as fault:
        yield f"the file cannot be read: {fault}"
        return
    yield from metadata_faults(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name in sorted(tensors.keys() - {planned.name for planned in plan.tensors}):
        yield f"{name} does not belong to this model"
    observer.stage("gguf read back", len(plan.tensors))
    for done, planned in enumerate(plan.tensors, 1):
        tensor = tensors.get(planned.name)
        if tensor is None:
            yield f"{planned.name} is missing"
        elif tuple(reversed(tensor.shape.tolist())) != planned.shape:
            yield f"{planned.name} has another shape"
        else:
            yield from value_faults(planned, tensor)
        observer.advance(done)
