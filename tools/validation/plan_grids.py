"""The grids of configurations for which plan and run are compared, for a CPU and for a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from plan_cases import Case

FACTORS: Mapping[str, Sequence[str]] = {
    "family": ("llama", "mistral", "qwen2", "qwen3", "gpt2"),
    "base": (
        "",
        "base.double_quant=false base.quant_type=fp4",
        "base.bits=8",
        "base.bits=16",
        "base.bits=16 adapter.method=full",
    ),
    "compute": ("", "base.compute_dtype=bfloat16", "base.compute_dtype=float16"),
    "vocabulary": ("8192", "32000", "64000", "128256"),
    "tied": ("", "tied"),
    "tokens": ("128", "256", "512"),
    "micro_batch": ("1", "2", "3"),
    "checkpointing": ("", "train.activation_checkpointing=false"),
    "optimizer": ("", "train.optimizer=adamw8bit"),
    "adapter": (
        "",
        "adapter.rank=64 adapter.targets=all",
        "adapter.rank=16 adapter.targets=all adapter.dropout=0.1",
        "adapter.rank=4 adapter.dtype=float16",
    ),
}
"""Factor of the CPU grid -> its values; "" is the default of the recipe."""
_TIMES = 3
"""Number of cases in which each compatible pair of values occurs."""
_LOGITS = {"": 7e7, "base.compute_dtype=bfloat16": 2.2e7, "base.compute_dtype=float16": 4.2e6}
"""Largest tokens x vocabulary that a CPU multiplies in seconds; few CPUs have 16-bit units."""


@cache
def cpu_grid() -> tuple[Case, ...]:
    """Return cases in which every pair of values of any two factors occurs, from a fixed seed.

    Excluded are pairs that a recipe refuses (full fine-tuning with adapter settings, 8-bit Adam on
    16-bit weights) and cases that take minutes.
    """
    draw = random.Random(0)
    drawn = [_draw(draw) for _ in range(1500)]
    missing = {pair: _TIMES for row in drawn for pair in _pairs(row)}
    chosen: list[dict[str, str]] = []
    while True:
        best = max(drawn, key=lambda row: sum(missing[pair] > 0 for pair in _pairs(row)))
        met = [pair for pair in _pairs(best) if missing[pair] > 0]
        if not met:
            return tuple(_case_of(row) for row in chosen)
        for pair in met:
            missing[pair] -= 1
        chosen.append(best)
        drawn.remove(best)


def _draw(draw: random.Random) -> dict[str, str]:
    while True:
        row = {name: draw.choice(values) for name, values in FACTORS.items()}
        if _quick(row) and all(
            _compatible(*pair) for pair in itertools.combinations(row.values(), 2)
        ):
            return row


def _compatible(first: str, second: str) -> bool:
    both = f"{first} {second}"
    if "optimizer=adamw8bit" in both and ("method=full" in both or "adapter.dtype=float16" in both):
        return False
    return not ("method=full" in both and "adapter.rank" in both)


def _quick(row: Mapping[str, str]) -> bool:
    logits = int(row["tokens"]) * int(row["micro_batch"]) * int(row["vocabulary"])
    return logits <= _LOGITS[row["compute"]]


def _pairs(row: Mapping[str, str]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    return itertools.combinations(row.items(), 2)


def _case_of(row: Mapping[str, str]) -> Case:
    sizes = f"data.seq_len={row['tokens']} train.micro_batch={row['micro_batch']}"
    settings = ("base", "compute", "checkpointing", "optimizer", "adapter")
    return Case(
        row["family"],
        "small",
        tuple(" ".join([sizes, *(row[name] for name in settings)]).split()),
        vocab_size=int(row["vocabulary"]),
        tied=row["tied"] == "tied",
    )


def cuda_grid() -> tuple[Case, ...]:
    """Return small shapes in all settings, then real shapes; the largest fit a GPU of 80 GiB."""
    small = [Case(family, "small", tuple(text.split()), 32000) for family, text in _SMALL]
    vocabularies = [
        Case("llama", "small", tuple(text.split()), size, tied)
        for size, tied, text in _VOCABULARIES
    ]
    real = [Case("llama", shape, tuple(text.split())) for shape, text in _REAL]
    return (*small, *vocabularies, *real)


def policy_grid(device: str) -> tuple[Case, ...]:
    """Return cases of every form of the activation policy, most with some blocks recomputed.

    device: cpu or cuda. A GPU of 24 GiB recomputes some blocks where the policy is `auto`.
    """
    policies = [
        Case(family, "small", (*text.split(), *more.split(), f"{_CHECKPOINTING}={number}"), 32000)
        for family, text, numbers, more in _POLICIES
        for number in numbers
    ]
    if device == "cpu":
        return tuple(policies)
    real = [
        Case("llama", shape, (f"data.seq_len={tokens}", _ALL, *more, f"{_CHECKPOINTING}={setting}"))
        for shape, tokens, setting, *more in _REAL_POLICIES
    ]
    return (*policies, *real)


_ALL = "adapter.targets=all"
_CHECKPOINTING = "train.activation_checkpointing"
_IN_BACKWARD = ("train.update_in_backward=true", "train.grad_accum=1", "train.max_grad_norm=null")
_LEAN = (*_IN_BACKWARD, "train.offload_inputs=true")
_POLICIES = (
    ("llama", "data.seq_len=256", (1, 3, 5), f"{_ALL} train.loss_chunk=64"),
    ("llama", "data.seq_len=128", (3,), "base.bits=16 adapter.method=full"),
    ("qwen3", "data.seq_len=256", (2, 4), "base.bits=8 base.outlier_threshold=0"),
    ("mistral", "data.seq_len=256", (4,), f"train.micro_batch=2 {_ALL} train.loss_chunk=100"),
    ("gpt2", "data.seq_len=256", (2,), f"{_ALL} adapter.dropout=0.1"),
    ("llama", "data.seq_len=256", (1, 4, 6), f"base.residency=host {_ALL}"),
    ("llama", "data.seq_len=256", (0, 3), f"{_ALL} train.loss_chunk=64 {' '.join(_IN_BACKWARD)}"),
    (
        "gpt2",
        "data.seq_len=128",
        (3,),
        f"base.bits=16 adapter.method=full {' '.join(_IN_BACKWARD)}",
    ),
)
"""(family, overrides, numbers of recomputed blocks, more overrides)."""
_REAL_POLICIES = (
    ("1B", 2048, "false", "train.loss_chunk=128"),
    ("8B", 2048, "true", "train.loss_chunk=160"),
    ("8B", 2048, "true", "train.loss_chunk=160", "train.offload_inputs=true"),
    ("8B", 2048, "true", "train.loss_chunk=160", *_IN_BACKWARD),
    ("1B", 2048, "9", "train.loss_chunk=128", "train.offload_inputs=true"),
    ("8B", 4096, "auto", "train.loss_chunk=auto"),
    ("8B", 8192, "auto", "train.loss_chunk=auto"),
    ("1B", 2048, 8, "train.loss_chunk=128"),
    ("8B", 2048, 16, "train.loss_chunk=160"),
    ("8B", 2048, 26, "train.loss_chunk=160"),
    ("8B", 8192, 14, "train.loss_chunk=261"),
    ("8B", 512, 32, "train.loss_chunk=64", "base.residency=host"),
    ("8B", 512, 32, "train.loss_chunk=64", "base.residency=host", *_LEAN),
    ("8B", 2048, 20, "train.loss_chunk=160", "base.residency=host"),
    ("8B", 8192, 32, "train.loss_chunk=64", "base.residency=host", "train.optimizer=adamw8bit"),
    ("1B", 2048, 16, "train.loss_chunk=64", "base.residency=disk"),
)
"""(shape, tokens, policy, further overrides)."""
_NO_CHECKPOINTING = "train.activation_checkpointing=false"
_INT8 = "base.bits=8 base.outlier_threshold=0"
"""Without outlier columns: their number depends on the data, and a plan assumes its bound."""
_SMALL = (
    ("llama", "data.seq_len=512"),
    ("llama", f"data.seq_len=512 {_ALL} {_NO_CHECKPOINTING}"),
    ("llama", "data.seq_len=512 base.double_quant=false base.quant_type=fp4"),
    ("llama", f"data.seq_len=512 {_INT8}"),
    ("llama", f"data.seq_len=256 train.micro_batch=4 {_INT8} {_ALL} {_NO_CHECKPOINTING}"),
    ("llama", "data.seq_len=512 base.bits=16"),
    ("llama", f"data.seq_len=256 train.micro_batch=4 base.bits=16 {_ALL} {_NO_CHECKPOINTING}"),
    ("llama", "data.seq_len=512 base.bits=16 adapter.method=full"),
    ("llama", f"data.seq_len=512 base.bits=16 adapter.method=full {_NO_CHECKPOINTING}"),
    ("llama", "data.seq_len=512 base.compute_dtype=float32"),
    ("llama", f"data.seq_len=512 base.compute_dtype=float16 adapter.dtype=float16 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=adamw8bit adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=paged_adamw adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=paged_adamw8bit adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 adapter.dropout=0.1 {_ALL}"),
    ("llama", f"data.seq_len=128 train.micro_batch=8 adapter.dropout=0.1 {_NO_CHECKPOINTING}"),
    ("mistral", f"data.seq_len=256 train.micro_batch=4 {_ALL}"),
    ("qwen2", f"data.seq_len=512 {_ALL} {_NO_CHECKPOINTING}"),
    ("qwen3", f"data.seq_len=512 {_ALL} {_NO_CHECKPOINTING}"),
    ("gpt2", "data.seq_len=512"),
    ("gpt2", f"data.seq_len=256 train.micro_batch=4 {_ALL} {_NO_CHECKPOINTING}"),
    ("gpt2", f"data.seq_len=512 {_INT8}"),
    ("gpt2", "data.seq_len=512 base.bits=16 adapter.method=full"),
)
_VOCABULARIES = (
    (8192, False, "data.seq_len=1024"),
    (64000, True, "data.seq_len=512"),
    (128256, False, f"data.seq_len=512 {_ALL}"),
    (128256, True, f"data.seq_len=512 base.bits=16 adapter.method=full {_NO_CHECKPOINTING}"),
)
_REAL = (
    ("1B", f"data.seq_len=1024 train.micro_batch=4 {_ALL}"),
    ("1B", f"data.seq_len=2048 {_NO_CHECKPOINTING}"),
    ("1B", f"data.seq_len=2048 {_INT8} {_ALL}"),
    ("1B", f"data.seq_len=2048 base.bits=16 train.optimizer=adamw8bit {_ALL}"),
    ("1B", "data.seq_len=512 base.bits=16 adapter.method=full"),
    ("1B", f"data.seq_len=32768 {_ALL}"),
    ("8B", "data.seq_len=2048"),
    ("8B", f"data.seq_len=2048 {_ALL}"),
    ("8B", f"data.seq_len=1024 train.micro_batch=4 {_ALL}"),
    ("8B", f"data.seq_len=1024 {_ALL} {_NO_CHECKPOINTING}"),
    ("8B", f"data.seq_len=2048 train.micro_batch=2 {_INT8} {_ALL}"),
    ("8B", f"data.seq_len=2048 base.bits=16 {_ALL}"),
    ("8B", f"data.seq_len=2048 train.optimizer=paged_adamw8bit adapter.rank=64 {_ALL}"),
    ("8B", f"data.seq_len=2048 base.double_quant=false adapter.dropout=0.05 {_ALL}"),
    ("8B", f"data.seq_len=8192 {_ALL}"),
    ("8B", f"data.seq_len=32768 {_ALL}"),
    ("70B", "data.seq_len=2048"),
    ("70B", f"data.seq_len=2048 train.optimizer=adamw8bit {_ALL}"),
    ("70B", f"data.seq_len=8192 {_ALL}"),
    ("70B", f"data.seq_len=16384 {_ALL}"),
)
"""(shape, overrides); `_SMALL` has (family, overrides)."""
