"""The plan equals the run: planned peaks compared with the tracker's and with torch's profiler's.

Each phase has three figures: the plan of `dry_run`, the count of the storage tracker in the real
job, and the allocations that torch's profiler records. The profiler shares no code with the others.
tools/validation/plan_vs_run.py runs the complete grid; this is a part of it that takes seconds.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import plan_grids
import plan_table
import pytest
import torch
from plan_cases import Case
from plan_grids import cpu_grid, cuda_grid
from plan_measure import PHASES, Run, measure_with_profiler, plan_case, profile_of_kind
from profiler_peak import PeakProfiler
from torch import Tensor

from qlora_cli.memory import cpu_rules, profile
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.ledger import Phase
from qlora_cli.memory.tracker import KernelRules, track_gradients
from qlora_cli.recipe.resolve import resolve
from qlora_cli.train.state import tag_living
from tests.helpers.marks import slow_after_first
from tests.helpers.runs import CPU

NO_CHECKPOINTING = "train.activation_checkpointing=false"
IN_BACKWARD = "train.update_in_backward=true train.grad_accum=1 train.max_grad_norm=null"
FULL = "base.bits=16 adapter.method=full"
CHUNKS = "data.seq_len=300 train.loss_chunk=160"
"""Two chunks of the loss, which a large vocabulary has without the setting."""
GRID = [
    Case(family, "tiny", tuple(text.split()), vocab_size, tied)
    for family, vocab_size, tied, text in (
        ("llama", 8192, False, "data.seq_len=256"),
        ("llama", 8192, False, "data.seq_len=256 base.bits=8 adapter.targets=all"),
        ("llama", 8192, False, "data.seq_len=128 base.scales=search adapter.targets=all"),
        ("llama", 8192, False, "data.seq_len=128 base.bits=16"),
        ("llama", 8192, False, 'data.seq_len=128 base.overrides={"down":8,"*.1.*":16}'),
        ("llama", 8192, False, "data.seq_len=128 base.bits=16 adapter.method=full"),
        ("llama", 8192, True, "data.seq_len=64 adapter.dropout=0.1 adapter.rank=64"),
        ("llama", 8192, False, "data.seq_len=128 train.optimizer=adamw8bit adapter.targets=all"),
        ("llama", 128256, True, "data.seq_len=300"),
        ("llama", 8192, False, "data.seq_len=256 adapter.method=dora adapter.targets=all"),
        ("gpt2", 8192, True, f"data.seq_len=128 adapter.method=dora {NO_CHECKPOINTING}"),
        ("llama", 8192, False, "data.seq_len=128 adapter.method=dora base.bits=8"),
        ("llama", 8192, False, f"data.seq_len=64 adapter.rank=64 {IN_BACKWARD}"),
        ("llama", 8192, False, f"data.seq_len=64 base.residency=host {IN_BACKWARD}"),
        ("gpt2", 8192, True, f"data.seq_len=64 {FULL} {NO_CHECKPOINTING} {IN_BACKWARD}"),
        ("llama", 8192, False, "data.seq_len=64 adapter.rank=64 adapter.lr_ratio=8"),
        ("llama", 8192, False, "data.seq_len=128 adapter.prefix=32 train.micro_batch=2"),
        ("gpt2", 8192, True, f"data.seq_len=128 adapter.prefix=16 {NO_CHECKPOINTING}"),
        ("qwen2", 8192, False, "data.seq_len=64 adapter.prefix=64 base.residency=host"),
        ("llama", 259, False, "data.seq_len=64 adapter.init=pissa adapter.targets=all"),
        ("gpt2", 259, True, "data.seq_len=64 adapter.init=pissa base.bits=16 adapter.rank=64"),
        ("gpt2", 259, True, "data.seq_len=64 adapter.init=loftq adapter.targets=all"),
        ("llama", 259, False, "data.seq_len=64 adapter.init=loftq base.residency=host"),
        ("llama", 8192, False, 'data.seq_len=64 adapter.targets=all adapter.ranks={"q":64,"up":9}'),
        ("mistral", 32000, False, f"data.seq_len=256 {NO_CHECKPOINTING}"),
        ("qwen2", 8192, True, "data.seq_len=256 train.micro_batch=2 adapter.targets=all"),
        ("qwen2", 8192, True, "data.seq_len=256 base.bits=8 adapter.dtype=float16"),
        (
            "qwen3",
            8192,
            False,
            f"data.seq_len=256 base.double_quant=false base.quant_type=fp4 {NO_CHECKPOINTING}",
        ),
        ("llama", 8192, False, "data.seq_len=256 task=preference"),
        ("llama", 8192, True, f"{CHUNKS} task=preference preference.loss=simpo"),
        ("gpt2", 8192, True, f"data.seq_len=128 task=preference {FULL} {NO_CHECKPOINTING}"),
        ("llama", 8192, False, "data.seq_len=256 base.residency=host"),
        ("llama", 8192, True, f"{CHUNKS} base.residency=host"),
        ("llama", 128256, False, "data.seq_len=128 base.residency=disk"),
        ("gpt2", 8192, True, "data.seq_len=256 adapter.targets=all"),
        ("gpt2", 8192, True, f"data.seq_len=256 base.bits=8 {NO_CHECKPOINTING}"),
        (
            "gpt2",
            8192,
            True,
            f"data.seq_len=128 base.bits=16 adapter.method=full {NO_CHECKPOINTING}",
        ),
    )
]
"""The largest vocabulary needs two chunks of the loss."""
PROFILE = profile_of_kind("cpu")


def phases_of(case: Case) -> dict[str, Phase]:
    """Return the planned phases that are compared; saving a checkpoint allocates nothing."""
    phases = plan_case(case, PROFILE).phases
    return {phase.name: phase for phase in phases if phase.name in PHASES}


def tracked(case: Case) -> dict[str, Phase]:
    """Return the phases as a job measures them."""
    run, instrument = Run.of(case, PROFILE), Instrument(CPU, PROFILE)
    with instrument.phase("load"):
        state = run.load()
        tag_living(state, instrument.tracker)
    if state.task.needs_constants:
        with instrument.phase("eval"):
            run.compute_constants(state)
    for name in ("first_step", "step"):
        with track_gradients(state.trainable.values(), instrument.tracker), instrument.phase(name):
            run.step(state)
    with instrument.phase("eval"):
        run.evaluate(state)
    return {phase.name: phase for phase in instrument.phases}


def profiled(case: Case) -> dict[str, int]:
    """Return the peak of each phase, measured by the profiler."""
    gc.collect()
    return measure_with_profiler(case, PROFILE)


@pytest.mark.parametrize(
    "case", slow_after_first(GRID), ids=lambda case: case.name.replace(" ", "-")
)
def test_the_plan_equals_the_run(case: Case) -> None:
    plan, run, peaks = phases_of(case), tracked(case), profiled(case)
    assert sorted(plan) == sorted(run) == sorted(peaks) == sorted(PHASES)
    errors = {
        name: (
            plan[name].peak_bytes / run[name].peak_bytes - 1,
            plan[name].peak_bytes / peaks[name] - 1,
        )
        for name in PHASES
    }
    message = ", ".join(f"{k} {peaks[k]} {a:+.2%} {b:+.2%}" for k, (a, b) in errors.items())
    for name in PHASES:
        for error in errors[name]:
            assert plan_table.UNDER <= error <= plan_table.OVER, (name, message)
    measured_peak = max(peaks.values())
    planned_peak = max(phase.peak_bytes for phase in plan.values())
    assert plan_table.UNDER <= planned_peak / measured_peak - 1 <= plan_table.OVER, message


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_pairs_need_at_most_1_3_times_the_memory_of_rows(loss: str) -> None:
    """Planned and measured, with as many tokens per micro-batch, most of them trained."""
    settings = ("data.seq_len=256", NO_CHECKPOINTING)
    rows = Case("llama", "tiny", settings, 8192)
    pairs = Case("llama", "tiny", (*settings, "task=preference", f"preference.loss={loss}"), 8192)
    for peak_of in (phases_of, tracked):
        peaks = [max(p.peak_bytes for p in peak_of(case).values()) for case in (pairs, rows)]
        assert peaks[0] <= 1.3 * peaks[1], peak_of.__name__


@pytest.mark.slow
def test_a_plan_without_kernel_rules_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit kernels cast complete operands: without the rules the plan is too low."""
    case = Case("llama", "tiny", ("base.bits=8", "data.seq_len=64"), 259)
    monkeypatch.setattr(profile, "CPU_RULES", KernelRules())
    plan, peaks = phases_of(case), profiled(case)
    assert min(plan[name].peak_bytes / peaks[name] - 1 for name in PHASES) < -0.01


@pytest.mark.slow
def test_a_plan_of_another_job_fails_the_comparison() -> None:
    """Half as many tokens and the same weights are outside of the tolerance."""
    case, half = (Case("llama", "tiny", (f"data.seq_len={n}",), 8192) for n in (256, 128))
    plan, peaks = phases_of(half), profiled(case)
    assert plan["step"].peak_bytes / peaks["step"] - 1 < -0.1


@pytest.mark.parametrize("grid", [cpu_grid, cuda_grid])
def test_grids_contain_different_valid_recipes(grid: Callable[[], tuple[Case, ...]]) -> None:
    cases = grid()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        resolve(case.recipe(), PROFILE)


def test_every_pair_of_settings_occurs_in_the_grid() -> None:
    """Except pairs that a recipe refuses and pairs that take minutes."""
    drawn = [set(case.name.split()) for case in cpu_grid()]
    assert len(drawn) >= 60
    for left, right in itertools.combinations(plan_grids.FACTORS.items(), 2):
        for first, second in itertools.product(*(words_of(*factor) for factor in (left, right))):
            both = first | second
            excluded = any(pair <= both for pair in EXCLUDED) or (
                SLOW in both and both & LARGE_VOCABULARIES
            )
            assert bool(excluded) != any(both <= words for words in drawn), both


FULL, SMALL_OPTIMIZER = "adapter.method=full", "train.optimizer=adamw8bit"
EXCLUDED = [
    {FULL, SMALL_OPTIMIZER},
    {"adapter.dtype=float16", SMALL_OPTIMIZER},
    *({FULL, rank} for rank in ("adapter.rank=4", "adapter.rank=16", "adapter.rank=64")),
]
SLOW, LARGE_VOCABULARIES = "base.compute_dtype=float16", {"vocab=64000", "vocab=128256"}


def words_of(factor: str, values: Sequence[str]) -> list[set[str]]:
    """Return the words of a case's name for each value; defaults have none."""
    key = {"vocabulary": "vocab=", "tokens": "data.seq_len=", "micro_batch": "train.micro_batch="}
    return [set(f"{key.get(factor, '')}{value}".split()) for value in values if value]


def test_the_order_and_the_bounds_of_a_table() -> None:
    good, over, under = (row(error) for error in (0.0, 0.031, -0.011))
    on_gpu, load = row(0.0, reserved=-0.051), row(0.001, load=-0.02)
    rows = [good, load, under, over, on_gpu]
    assert plan_table.largest_error_first(rows) == [on_gpu, over, under, load, good]
    assert plan_table.failures(plan_table.largest_error_first(rows)) == [
        "case 0.0: reserved -5.10%",
        "case 0.031: peak +3.10%, step +3.10%",
        "case -0.011: peak -1.10%, step -1.10%",
        "case 0.001: load -2.00%",
    ]


def row(error: float, reserved: float | None = None, load: float = 0.0) -> dict[str, Any]:
    phases = {"load": {"error": load}, "step": {"error": error}}
    return {"case": f"case {error}", "error": error, "phases": phases} | {
        "reserved": {"error": reserved}
    }


def kernel_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Return (peak inside one call, bytes that remain after it), measured by the profiler."""
    run()
    profiler = PeakProfiler()
    with profiler.phase("kernel"):
        kept = run()
    del kept
    return profiler.peaks["kernel"], profiler.live_bytes


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-100, 100, torch.Size(shape).numel()).view(shape).to(dtype)


@pytest.mark.parametrize("into", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.int32, torch.float16])
def test_rule_of_mixed_dtypes(weight_dtype: torch.dtype, into: torch.dtype) -> None:
    codes, scale = numbers(256, 320, dtype=weight_dtype), numbers(256, 1, dtype=torch.float32)
    out = torch.empty(256, 320, dtype=into)
    peak, _ = kernel_bytes(lambda: torch.mul(codes, scale, out=out))
    assert (
        sum(cpu_rules.CPU_RULES.temporaries["aten::mul.out"]((codes, scale), {"out": out}, out))
        == peak
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rule_of_quantization(quant_type: str, dtype: torch.dtype) -> None:
    weight = numbers(256, 320, dtype=dtype)
    arguments = (weight, 64, quant_type, torch.uint8)
    peak, kept = kernel_bytes(lambda: torch.ops.bitsandbytes.quantize_4bit(*arguments))
    ruled = sum(cpu_rules.CPU_RULES.temporaries["bitsandbytes::quantize_4bit"](arguments, {}, None))
    assert ruled == pytest.approx(peak - kept, rel=0.01)


def test_operands_of_one_dtype_need_no_cast() -> None:
    left, right = numbers(8, 8, dtype=torch.float16), numbers(8, 8, dtype=torch.float16)
    rule = cpu_rules.CPU_RULES.temporaries["aten::mul.Tensor"]
    assert not rule((left, right), {}, left)
    assert not rule((left, 2.0), {}, left)
