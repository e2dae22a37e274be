"""Measure what `qlora verify --server` finds for correct servers and for seeded faults.

    tools/validation/server_verification.py --work FOLDER [--llama-server PROGRAM]
        [--out FILE.json] [MODEL ...]

Each case starts a server on loopback and verifies it: llama-cpp-python's server, and for some cases
llama.cpp's own if PROGRAM is named. Exits with 1 if a correct server fails or a fault is not named.
The models are made in FOLDER once (`served_models.py`). Needs the extra `llama`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from served_models import KINDS, NAMES, ROOT, FineTune, fine_tune, provenance

from qlora_cli.events import Silent
from qlora_cli.export.gguf.llama_library import llama_cpp
from qlora_cli.export.gguf.write import export_gguf
from qlora_cli.export.serve.rounding import Bits
from qlora_cli.files.atomic import write_json
from qlora_cli.jobs import verify_server

_START_SECONDS = 120
_LARGE = "SmolLM2-135M-Instruct"
"""Takes minutes per case, so it has fewer cases."""
_BOTH_PROGRAMS = ("F16", "Q4_K_M", "base", "no BOS token")


@dataclass(frozen=True)
class Case:
    """A server to verify.

    what: what it serves. file: the GGUF file. bits: of --bits. wanted: part of the fault that must
    be reported; None if the server is correct. words: further options of llama-cpp-python's server.
    """

    what: str
    file: Path
    bits: Bits = 4
    wanted: str | None = None
    words: tuple[str, ...] = ()


def cases(made: FineTune, folder: Path) -> Iterator[Case]:
    """Yield the servers to verify. folder: for the files of the faults."""
    files = {kind: made.merged / f"model-{kind.upper()}.gguf" for kind in KINDS}
    for kind in ("f16", "q8_0", "q4_k_m") if made.name == _LARGE else KINDS:
        yield Case(kind.upper(), files[kind])
    no_logprobs = ("--logits_all", "False")
    if made.name != _LARGE:
        yield Case("Q4_K_M, no log-probabilities", files["q4_k_m"], words=no_logprobs)
        yield Case("F16, no log-probabilities", files["f16"], words=no_logprobs)
        yield Case("Q8_0 for 8 bits", files["q8_0"], bits=8)
        yield Case("Q4_K_M for 8 bits", files["q4_k_m"], bits=8, wanted="quantization: ")
    if made.name == "starter":  # The rows of the others are no multiple of 256, which Q2_K needs.
        yield Case("Q2_K", _quantized(files["f16"], folder / "q2_k.gguf"), wanted="weights: ")
    base = _base_file(made.base, folder / "base-only")
    yield Case("base", base, wanted="weights: the base without the adapter")
    if made.name != _LARGE:
        base_q4 = _quantized(base, folder / "base-q4_k_m.gguf", "LLAMA_FTYPE_MOSTLY_Q4_K_M")
        yield Case("base, Q4_K_M", base_q4, wanted="weights: ")
    if made.name != _LARGE:
        other = _other_file(made.merged, folder / "other")
        yield Case("other weights", other, wanted="weights: ")
        what = "other weights, no log-probabilities"
        yield Case(what, other, wanted="weights: ", words=no_logprobs)
    no_bos = _without_bos(files["f16"], folder / "no-bos.gguf")
    if no_bos is not None:
        wanted = "special tokens: the server omits the BOS token"
        yield Case("no BOS token", no_bos, wanted=wanted)
    if made.name == _LARGE:
        wanted = "template: the server "
        yield Case("template of Llama 2", files["f16"], 4, wanted, ("--chat_format", "llama-2"))
        template = _other_template(files["f16"], folder / "template.gguf")
        yield Case("other template", template, wanted=wanted)


def _quantized(source: Path, file: Path, kind: str = "LLAMA_FTYPE_MOSTLY_Q2_K") -> Path:
    library = llama_cpp()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, kind)
    words = str(source).encode(), str(file).encode(), ctypes.byref(settings)
    if library.llama_model_quantize(*words) != 0:
        raise RuntimeError(f"{file} could not be written")
    return file


def _base_file(base: Path, folder: Path) -> Path:
    if not folder.is_dir():
        shutil.copytree(base, folder)
    return export_gguf(folder, "f16", Silent())


def _other_file(merged: Path, folder: Path) -> Path:
    """Return the file of a model whose first and last block are exchanged."""
    if not folder.is_dir():
        shutil.copytree(merged, folder, ignore=shutil.ignore_patterns("*.gguf"))
        tensors = load_file(folder / "model.safetensors")
        last = json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1
        first_block, last_block = "model.layers.0.", f"model.layers.{last}."
        swapped = {
            name.replace(first_block, "@").replace(last_block, first_block).replace("@", last_block)
            if name.startswith((first_block, last_block))
            else name: tensor
            for name, tensor in tensors.items()
        }
        save_file(swapped, folder / "model.safetensors", {"format": "pt"})
    return export_gguf(folder, "f16", Silent())


def _without_bos(source: Path, file: Path) -> Path | None:
    """Write a copy that adds no BOS token; return None if the source adds none."""
    field = GGUFReader(source).get_field("tokenizer.ggml.add_bos_token")
    if field is None or not field.contents():
        return None
    shutil.copy(source, file)
    changed = GGUFReader(file, "r+").get_field("tokenizer.ggml.add_bos_token")
    assert changed is not None
    changed.parts[-1][0] = False
    return file


def _other_template(source: Path, file: Path) -> Path:
    """Write a copy whose chat template begins messages with another text of the same length."""
    field = GGUFReader(source).get_field("tokenizer.chat_template")
    assert field is not None
    template = field.contents().encode()
    changed = template.replace(b"<|im_start|>", b"[|im_begin|]")
    file.write_bytes(source.read_bytes().replace(template, changed))
    return file


@contextmanager
def served(command: Callable[[int], list[str]]) -> Iterator[str]:
    """Run a server on loopback and yield its address. command: of a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command(port), stdout=silent, stderr=silent)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(_START_SECONDS * 5):
            try:
                urlopen(f"{address}/v1/models").close()
                break
            except URLError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def measure(case: Case, made: FineTune, program: str | None) -> dict[str, Any]:
    """Verify the server of a case. program: llama-server; None for llama-cpp-python's server."""

    def command(port: int) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(port), "--model", str(case.file)]
        if program is None:
            words = ["--n_ctx", "1024", "--n_threads", "1", *case.words]
            return [sys.executable, "-m", "llama_cpp.server", *where, *words]
        return [program, *where, "--ctx-size", "1024", "--threads", "1", "--parallel", "1"]

    with served(command) as url:
        found = verify_server.run(
            made.merged, against=made.run, url=url, name=None, bits=case.bits, observer=Silent()
        ).to_dict()
    kept = {key: found[key] for key in found if key not in ("server", "model", "explanation")}
    text = " ".join(found["faults"])
    is_right = found["passed"] if case.wanted is None else case.wanted in text
    program_name = "llama-cpp-python" if program is None else "llama-server"
    return {"served": case.what, "program": program_name, "is_right": is_right, **kept}


def _programs(case: Case, model: str, llama_server: str | None) -> tuple[str | None, ...]:
    """Return the programs that serve a case, as `measure` takes them."""
    if llama_server is None:
        return (None,)
    if model == _LARGE:
        return (llama_server,) if case.what in ("Q8_0", "other template") else (None,)
    return (None, llama_server) if case.what in _BOTH_PROGRAMS else (None,)


def _measured_before(file: Path) -> dict[str, Any]:
    """Return the results of other models that the file has."""
    return dict(json.loads(file.read_text())["models"]) if file.is_file() else {}


def main() -> int:
    """Verify all cases, write the results and print those that are not as wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=NAMES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama-server")
    out = ROOT / "tools/measurements/server_verification.json"
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.models:
        made = fine_tune(name, arguments.work / name)
        results[name] = []
        for case in cases(made, arguments.work / name):
            for program in _programs(case, name, arguments.llama_server):
                found = measure(case, made, program)
                results[name].append(found)
                print(name, json.dumps(found), file=sys.stderr, flush=True)
    measured = {**_measured_before(arguments.out), **results}
    content = {**provenance("server_verification.py --work FOLDER"), "models": measured}
    write_json(arguments.out, content)
    wrong = [case for found in results.values() for case in found if not case["is_right"]]
    print(json.dumps(wrong, indent=1))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
