"""Launches and bytes of one training step per block, beside PEFT's under the same counter.

    FAKE_GPU python tools/benchmarks/count_operations.py --out tools/measurements/operations.json

Counts on a CUDA GPU, or on a fake GPU, which runs the CUDA code of torch with empty kernels: counts
do not depend on values. A model of two blocks and one of three are counted; the difference is one
block. Both sides: NF4 with double quantization, LoRA of rank 16 on all linears in float32, one
sequence, all blocks recomputed, AdamW, bfloat16. PEFT is set up as its documentation says:
`prepare_model_for_kbit_training`, autocast, fused AdamW of torch.

`--table` writes the table of docs/performance.md between its markers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Run as a script, only this folder is on the path; the configurations are in tools/validation.
sys.path.append(str(Path(__file__).resolve().parents[1] / "validation"))

from operation_counter import OperationCounter
from plan_cases import Case
from plan_measure import Run, describe_machine, profile_of_kind

from qlora_cli.errors import QloraError
from qlora_cli.files.atomic import write_json
from qlora_cli.train.step import train_step

RANK = 16
SHAPES = ("1B", "8B")
BLOCKS = (2, 3)
"""Numbers of blocks that are counted."""
_SETTINGS = f"adapter.targets=all adapter.rank={RANK} train.grad_accum=1 train.loss_chunk=160"
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- operations -->", "<!-- end of operations -->"
_LARGEST = 12
"""Operations per side that the file names, those with the most launches."""


def count_ours(config: Any, case: Case, counter: OperationCounter) -> None:
    """Count one later step of this package's model."""
    base = Run.of(case, profile_of_kind("cuda"))
    run = Run(case, base.recipe, config, base.device)
    state = run.load()
    batches = run.batches(state)
    # The first step creates the optimizer's states. Garbage on a fake GPU may skip a step.
    for _ in range(2):
        while True:
            try:
                with counted(counter):
                    outcome = train_step(state, batches, 1e-4)
            except QloraError:
                continue
            if not outcome.skipped:
                break


def count_peft(config: Any, case: Case, counter: OperationCounter) -> None:
    """Count one later step of PEFT's model."""
    from peft_trainer import peft_step
    from transformers import masking_utils

    # Whether a batch is packed depends on values, which a fake GPU does not have. It is not.
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    recipe = case.recipe()
    step = peft_step(config, RANK, torch.device("cuda"), recipe.data.seq_len)
    for _ in range(2):
        with counted(counter):
            step()


@contextmanager
def counted(counter: OperationCounter) -> Iterator[None]:
    """Count only what happens inside the block."""
    counter.clear()
    with counter:
        yield


def expansions(num_tokens: int) -> Mapping[str, Callable[..., Any]]:
    """Return what bitsandbytes' product does inside if it has no fused kernel for so many rows."""
    from bitsandbytes.backends.cuda.ops import _gemm_4bit_custom_max_m
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    if num_tokens <= _gemm_4bit_custom_max_m:
        return {}
    return {"bitsandbytes::gemm_4bit": _gemm_4bit_default_impl}


Side = Callable[[Any, Case, OperationCounter], None]
SIDES: Mapping[str, Side] = {"ours": count_ours, "peft": count_peft}


def measure(shape: str, seq_len: int, side: Side) -> dict[str, Any]:
    """Return launches and bytes per block and per step of one side."""
    case = Case("llama", shape, (f"data.seq_len={seq_len}", *_SETTINGS.split()))
    launches: list[Counter[str]] = []
    num_bytes: list[Counter[str]] = []
    for number in BLOCKS:
        config = case.config()
        config.num_hidden_layers = number
        counter = OperationCounter(expansions=expansions(seq_len))
        side(config, case, counter)
        launches.append(Counter(counter.launches))
        num_bytes.append(Counter(counter.num_bytes))
    blocks = case.config().num_hidden_layers
    return {
        "launches": _extended(launches, blocks),
        "bytes": _extended(num_bytes, blocks),
        "launches_per_block_by_operation": _largest(launches, launches),
        "bytes_per_block_by_operation": _largest(num_bytes, num_bytes),
    }


def _extended(counts: Sequence[Counter[str]], blocks: int) -> dict[str, int]:
    """Return the count per block, outside of blocks and per step of `blocks` blocks."""
    fewer, more = (counter.total() for counter in counts)
    block = more - fewer
    rest = fewer - BLOCKS[0] * block
    return {"block": block, "rest": rest, "step": rest + blocks * block}


def _largest(values: Sequence[Counter[str]], order: Sequence[Counter[str]]) -> dict[str, int]:
    per_block = Counter({name: values[1][name] - values[0][name] for name in values[1]})
    return dict(per_block.most_common(_LARGEST))


def table(report: Mapping[str, Any]) -> str:
    """Return the table of docs/performance.md."""
    lines = [
        "| shape | | launches per block | launches per step | GB per block | GB per step |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        for name in SIDES:
            launches, moved = row[name]["launches"], row[name]["bytes"]
            lines.append(
                f"| {row['shape']}, 1 x {row['tokens']:,} | {name} | {launches['block']} | "
                f"{launches['step']:,} | {moved['block'] / 1e9:.2f} | {moved['step'] / 1e9:.1f} |"
            )
        ratios = [
            row["ours"][kind][part] / row["peft"][kind][part]
            for kind, part in (
                ("launches", "block"),
                ("launches", "step"),
                ("bytes", "block"),
                ("bytes", "step"),
            )
        ]
        lines.append("| | ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def write_table(page: Path, report: Mapping[str, Any]) -> None:
    """Write the table between the markers of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{after}")


def main(words: Sequence[str] | None = None) -> None:
    """Count and write one JSON file and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=tuple(SIDES))
    parser.add_argument("--table", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args(words)
    rows = [
        {"shape": shape, "tokens": options.seq_len}
        | {name: measure(shape, options.seq_len, SIDES[name]) for name in options.sides}
        for shape in options.shapes
    ]
    given = sys.argv[1:] if words is None else words
    command = shlex.join(["python", "tools/benchmarks/count_operations.py", *given])
    report = {"command": command, **describe_machine("cuda"), "rows": rows}
    write_json(options.out, report)
    if options.table:
        write_table(PAGE, report)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
