"""Write a merged model as one GGUF file, for llama.cpp and the programs that are built on it.

The file is written from the merged folder's own tensors, one at a time. Then it is read back and
compared with them (`read_back.py`, or `quantized.py` after llama.cpp's quantizer). It gets its name
only after it has passed.
"""

from __future__ import annotations

from pathlib import Path

from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.gguf.encode import encoded
from qlora_cli.export.gguf.llama_library import require_llama_cpp
from qlora_cli.export.gguf.modelfile import write_modelfile
from qlora_cli.export.gguf.plan import GgufPlan
from qlora_cli.export.gguf.quantized import quantized_faults
from qlora_cli.export.gguf.quantizer import quantize_file
from qlora_cli.export.gguf.read_back import gguf_faults, verify_gguf
from qlora_cli.export.options import (
    GGUF_ENCODINGS,
    QUANTIZED_GGUFS,
    GgufEncoding,
    GgufType,
    QuantizedGguf,
)
from qlora_cli.files.atomic import (
    atomic_file,
    remove_partial_files,
    report_write_errors,
    require_free_space,
)


def check_exportable(base: Path, kind: GgufType, out: Path, merged_bytes: int) -> None:
    """Check before a merge that its model can be written as a GGUF file.

    base: the base's folder, for config and tokenizer.
    kind: type of the file.
    out: folder of the merge.
    merged_bytes: size of the merged weights that are still to be written to the same disk.

    Raises UsageError if llama.cpp does not support the model or its quantizer is missing,
    ModelError if the folder is damaged, QloraError if the disk has no space for both the merged
    model and its GGUF file.
    """
    needed = GgufPlan(base, _written_encoding(kind)).num_bytes + merged_bytes
    if kind in QUANTIZED_GGUFS:
        require_llama_cpp(f"--gguf {kind}")
        # No tensor of these types is larger than in Q8_0.
        needed += GgufPlan(base, "q8_0").num_bytes
    existing = next(parent for parent in out.resolve().parents if parent.is_dir())
    require_free_space("the merged model with its GGUF file", existing, needed)


def export_gguf(folder: Path, kind: GgufType, observer: Observer) -> Path:
    """Write a GGUF file such as `model-Q8_0.gguf` into a merged folder and return its path.

    The `Modelfile` for Ollama next to it names this file, unless it was changed by hand. A type of
    llama.cpp's quantizer is made of a float16 file, which is removed unless the folder had it.

    If the file exists already and is the one that would be written, it is kept. The file appears
    complete and verified, or not at all.

    Raises UsageError if another file has this name, VerificationFailed if the file read back
    differs, QloraError if the disk cannot be written or a value is too large for the encoding, and
    UsageError and ModelError as `check_exportable` does.
    """
    if kind in QUANTIZED_GGUFS:
        require_llama_cpp(f"--gguf {kind}")
    plan = GgufPlan(folder, _written_encoding(kind))
    for note in plan.notes():
        observer.note(note)
    file = folder / file_name(kind)
    if file.exists():
        _require_same(file, plan, observer)
    else:
        _write_verified(plan, kind, file, observer)
    written = write_modelfile(folder, file)
    if written is not None:
        observer.note(written)
    return file


def _write_verified(plan: GgufPlan, kind: GgufType, file: Path, observer: Observer) -> None:
    """Write a file under a temporary name, read it back, and give it its name."""
    with report_write_errors("the GGUF file", file):
        remove_partial_files(file)
        with atomic_file(file) as partial:
            if kind in QUANTIZED_GGUFS:
                _write_quantized(plan, kind, partial, observer)
            else:
                _write(plan, partial, observer)
            verify_gguf(partial, plan, observer, is_quantized=kind in QUANTIZED_GGUFS)


def file_name(kind: GgufType) -> str:
    """Return the name of the GGUF file that merging writes of this type."""
    return f"model-{kind.upper()}.gguf"


def encoding_of(file: Path) -> GgufEncoding | None:
    """Return the encoding that merging gives a file of this name.

    Returns None for any other name, and for files that llama.cpp's quantizer writes.
    """
    names = {file_name(encoding): encoding for encoding in GGUF_ENCODINGS}
    return names.get(file.name)


def _written_encoding(kind: GgufType) -> GgufEncoding:
    """Return the encoding that is written; llama.cpp's quantizer needs a float16 file."""
    return "q8_0" if kind == "q8_0" else "f16"


def _require_same(file: Path, plan: GgufPlan, observer: Observer) -> None:
    """Raise UsageError if an existing file is not the one that would be written."""
    check = gguf_faults if encoding_of(file) else quantized_faults
    if not file.is_file() or any(check(file, plan, observer)):
        raise UsageError(
            f"{file} exists and is not the GGUF file of this merged model",
            where="--gguf",
            hint="move the file elsewhere or remove it, and run the same command again",
        )


def _write_quantized(plan: GgufPlan, kind: QuantizedGguf, file: Path, observer: Observer) -> None:
    """Write a file with llama.cpp's quantizer. plan: of the float16 file."""
    half = plan.folder / file_name("f16")
    if half.exists():
        _require_same(half, plan, observer)
        quantize_file(half, kind, file)
        return
    for left_over in plan.folder.glob(f".{file_name(kind)}.*-f16"):  # of a killed process
        left_over.unlink()
    source = file.with_name(f"{file.name}-f16")
    try:
        _write(plan, source, observer)
        observer.stage("quantize", 1)
        quantize_file(source, kind, file)
    finally:
        source.unlink(missing_ok=True)


def _write(plan: GgufPlan, file: Path, observer: Observer) -> None:
    writer = plan.writer()
    observer.stage("gguf", len(plan.tensors))
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, planned in enumerate(plan.tensors, 1):
            writer.write_tensor_data(encoded(planned))
            observer.advance(done)
        writer.flush()
    finally:
        writer.close()
