"""Training speed and peak memory, beside PEFT's on the same shape where it is importable.

    python tools/benchmarks/bench_train.py --shape 8B --device cuda --out FILE.json

Weights are made on the spot. NF4 with double quantization, LoRA of rank 16 on all linears, one
sequence of full length a step, checkpointed blocks, AdamW: for both. Both models are in memory at
once and take turns, the order changing, so that clocks and heat are the same; the ratio is taken
within a turn. What one holds while the other runs is taken off the other's peak. The other side is
PEFT as its documentation sets it up: `prepare_model_for_kbit_training`, autocast to bfloat16.

`--shape starter` is the embedded base by `qlora train`'s own job, which has no other side.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# Run as a script, only this folder is on the path; the configurations are in tools/validation.
sys.path.append(str(Path(__file__).resolve().parents[1] / "validation"))

from bench_inference import spread, where
from plan_cases import Case, step_batches_of
from plan_measure import Run, profile_of_kind

from qlora_cli.events import Silent
from qlora_cli.files.atomic import write_json
from qlora_cli.jobs import train
from qlora_cli.recipe.load import load_recipe
from qlora_cli.train.step import train_step

SHAPES = ("starter", "tiny", "small", "1B", "8B")
RANK = 16
_SETTINGS = (
    f"adapter.targets=all adapter.rank={RANK} adapter.alpha=32.0 train.grad_accum=1 train.lr=1e-4"
)


class MethodPeak:
    """One compared method: a function that runs a step, its seconds, and the GPU memory."""

    def __init__(self, device: torch.device, load: Callable[[], Callable[[], float]]) -> None:
        self._device = device
        before = self._now()
        self._step = load()
        self.held_bytes = self._now() - before
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes = 0

    def turn(self, steps: int) -> float:
        """Seconds a step, of so many in a row."""
        others = self._now() - self.held_bytes
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        self.losses += [self._step() for _ in range(steps)]
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - others)
        self.seconds.append((time.perf_counter() - began) / steps)
        return self.seconds[-1]

    def warm_up(self) -> None:
        """The first step makes the optimizer's states, which are its own from then on."""
        before = self._now()
        self.turn(1)
        self.held_bytes += self._now() - before
        self.turn(1)
        self.seconds.clear()

    def require(self, tokens: int) -> dict[str, Any]:
        """Figures, over the turns."""
        return {
            "tokens_per_second": spread([tokens / one for one in self.seconds]),
            "seconds_per_step": spread(self.seconds),
            "peak_allocated_bytes": self.peak_bytes,
            "losses_first_and_last": [self.losses[0], self.losses[-1]],
        }

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else 0


def ours(case: Case, kind: str) -> Callable[[], float]:
    """The job's own state and step on the largest batch."""
    run = Run.of(case, profile_of_kind(kind))
    state = run.load()
    window = step_batches_of(run.recipe, run.config)
    return lambda: train_step(state, window, run.recipe.train.lr).loss


def compare(shape: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ours and, where it can be, PEFT's, in turns."""
    device = torch.device(kind)
    case = Case("llama", shape, (f"data.seq_len={options.seq_len}", *_SETTINGS.split()))
    mine = MethodPeak(device, lambda: ours(case, kind))
    mine.warm_up()
    other, reason = _other_side(case, device, options)
    sides = [mine] if other is None else [mine, other]
    for turn in range(options.rounds):
        for method_peak in sides if turn % 2 else reversed(sides):
            method_peak.turn(options.steps)
    ratio = None
    if other is not None:
        pairs = zip(mine.seconds, other.seconds, strict=True)
        ratio = spread([theirs / own for own, theirs in pairs])
    return {
        "case": case.name,
        "tokens_per_step": options.seq_len,
        "ours": mine.require(options.seq_len),
        "peft": reason if other is None else other.require(options.seq_len),
        "ours_is_so_many_times_as_fast": ratio,
    }


def _other_side(
    case: Case, device: torch.device, options: argparse.Namespace
) -> tuple[MethodPeak | None, str]:
    if options.alone or importlib.util.find_spec("peft") is None:
        return None, "not asked for" if options.alone else "peft is not importable here"
    from peft_trainer import peft_step

    try:
        method_peak = MethodPeak(
            device, lambda: peft_step(case.config(), RANK, device, options.seq_len)
        )
        method_peak.warm_up()
    except torch.OutOfMemoryError as fault:
        return None, f"does not fit beside ours: {str(fault).splitlines()[0]}"
    return method_peak, ""


def starter(options: argparse.Namespace) -> dict[str, Any]:
    """The embedded base by the job itself, instrument and all."""
    with tempfile.TemporaryDirectory() as place:
        steps = options.rounds * options.steps
        settings = [
            f"output={place}/run",
            f"train.steps={steps}",
            f"data.seq_len={options.seq_len}",
        ]
        result = train.run(
            load_recipe("starter", settings), recipe_path=None, resume=False, observer=Silent()
        )
    return {
        "case": " ".join(["starter", *settings[1:]]),
        "ours": {
            "tokens_per_second": result.tokens_per_second,
            "peak_allocated_bytes": result.ledger.measured_peak_bytes,
            "peak_reserved_bytes": result.ledger.allocator.reserved,
            "train_loss": result.train_loss,
            "eval_loss": result.eval_loss,
        },
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measures and writes one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn")
    parser.add_argument("--alone", action="store_true", help="without PEFT")
    options = parser.parse_args(words)
    command_words = sys.argv[1:] if words is None else words
    content = {
        "command": shlex.join(["python", "tools/benchmarks/bench_train.py", *command_words]),
        **where(),
    }
    if options.shape == "starter":
        content |= starter(options)
    else:
        content |= compare(options.shape, options.device, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, content)
    print(json.dumps({key: content[key] for key in content if key != "versions"}, indent=1))


if __name__ == "__main__":
    main()
