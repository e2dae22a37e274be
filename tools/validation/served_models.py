"""Small real models, fine-tuned and merged, for the measurements of GGUF files and of servers.

- starter: the embedded base, on its own rows of prompt and completion. No chat template.
- stories260K: 0.26 M parameters, a tokenizer with a BOS token, on Alpaca rows as plain prompts.
- SmolLM2-135M-Instruct: an instruct model with a chat template, on chats of two turns that are made
  of Alpaca rows, with a system prompt.

All but the first need the shared data (see CONTRIBUTING.md).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("QLORA_SHARED", ROOT.parent / "shared")) / "data"
KINDS = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
_SHORT = 400
"""Largest number of characters of an Alpaca row that is used."""


@dataclass(frozen=True)
class FineTune:
    """A merged fine-tune. run, merged: its folders. base: folder of the base."""

    name: str
    base: Path
    run: Path
    merged: Path


def fine_tune(name: str, folder: Path) -> FineTune:
    """Train, merge and export a model in a folder, if it is not there, and return it."""
    made = FineTune(name, folder / "base", folder / "run", folder / "merged")
    folder.mkdir(parents=True, exist_ok=True)
    settings = _MODELS[name](folder)
    base = Path(settings["model"]["name"])
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, "output": str(made.run)}))
    if not (made.run / "run.json").is_file():
        qlora("train", recipe)
    for kind in KINDS:
        if not (made.merged / f"model-{kind.upper()}.gguf").is_file():
            words = ("--out", made.merged, "--base", "original", "--dtype", "float16")
            qlora("merge", made.run, *words, "--gguf", kind)
    if name == "starter":
        base = ROOT / "qlora_cli/starter"
    return FineTune(name, base, made.run, made.merged)


def qlora(*words: object) -> None:
    """Run a command of this checkout. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "qlora_cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def provenance(script: str) -> dict[str, Any]:
    """Return what a table of figures needs: command, device and versions."""
    names = ("torch", "transformers", "llama-cpp-python", "gguf")
    return {
        "command": f"python tools/validation/{script}",
        "device": f"CPU, {_processor()}, one thread",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _starter(folder: Path) -> dict[str, Any]:
    return {
        "model": {"name": "starter"},
        "base": {"bits": 16},
        "adapter": {"rank": 8, "alpha": 16, "targets": "all"},
        "data": {
            "train": str(ROOT / "qlora_cli/starter/train.jsonl"),
            "eval": str(ROOT / "qlora_cli/starter/held_out.jsonl"),
            "seq_len": 256,
        },
        "train": {"steps": 40, "micro_batch": 1, "grad_accum": 2, "lr": 1e-3},
    }


def _stories(folder: Path) -> dict[str, Any]:
    rows = [json.dumps(row) for row in _alpaca(200)]
    return {
        "model": {"name": str(SHARED / "models/stories260K")},
        "base": {"bits": 16},
        "adapter": {"rank": 8, "alpha": 16, "targets": "all"},
        "data": _files(folder, rows, 160) | {"seq_len": 512},
        "train": {"steps": 60, "micro_batch": 1, "grad_accum": 2, "lr": 2e-3},
    }


def _smollm2(folder: Path) -> dict[str, Any]:
    base = folder / "base"
    if not (base / "config.json").is_file():
        subprocess.run([sys.executable, str(SHARED / "smollm2.py"), str(base)], check=True)
    rows = list(_alpaca(96))
    chats = [
        json.dumps({"messages": [*_turns(first), *_turns(second)]})
        for first, second in zip(rows[::2], rows[1::2], strict=True)
    ]
    files = _files(folder, chats, 40)
    return {
        "model": {"name": str(base)},
        "base": {"bits": 16},
        "adapter": {"rank": 8, "alpha": 16, "targets": "all"},
        "data": files | {"seq_len": 512, "system": "You answer in plain words."},
        "train": {"steps": 10, "micro_batch": 1, "grad_accum": 2, "lr": 5e-4},
    }


def _turns(row: dict[str, str]) -> list[dict[str, str]]:
    question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]


def _alpaca(number: int) -> Iterator[dict[str, str]]:
    """Yield the first short rows."""
    lines = (SHARED / "instruct/alpaca/alpaca_data_5k.jsonl").read_text().splitlines()
    short = (json.loads(line) for line in lines if len(line) < _SHORT)
    return (row for row, _ in zip(short, range(number), strict=False))


def _files(folder: Path, rows: list[str], num_train: int) -> dict[str, Any]:
    """Write the rows of training and the others as held-out rows, and return their paths."""
    parts = {"train": rows[:num_train], "eval": rows[num_train:]}
    for part, lines in parts.items():
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return {part: str(folder / f"{part}.jsonl") for part in parts}


_MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "starter": _starter,
    "stories260K": _stories,
    "SmolLM2-135M-Instruct": _smollm2,
}
NAMES = tuple(_MODELS)
