"""An invented result of each job, for tests of how results are shown."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from qlora_cli.data.findings import finding
from qlora_cli.jobs.results import (
    Check,
    Compared,
    DataResult,
    DoctorResult,
    EvalResult,
    MergeResult,
    PlanResult,
    QuickstartResult,
    ReportResult,
    ShownRow,
    TrainResult,
    VerifyResult,
)
from qlora_cli.memory.ledger import Allocator, Device, Ledger, MethodPeak, Phase
from qlora_cli.memory.timeline import PhaseTrace, Timeline
from qlora_cli.plan.results import Advice, Line
from qlora_cli.units import GIB, MIB

AFTER_LOAD = {"base": 3500 * MIB, "quant_constants": 110 * MIB, "embeddings": 1002 * MIB}
STEP = {**AFTER_LOAD, "adapter": 26 * MIB, "gradients": 26 * MIB, "optimizer": 52 * MIB}
STEP |= {"activations": 700 * MIB, "loss": 300 * MIB}
FULL = {"adapter": 16 * GIB, "gradients": 30 * GIB, "optimizer": 60 * GIB}


def _phase(name: str, at_peak: dict[str, int]) -> Phase:
    return Phase(name, sum(at_peak.values()), sum(AFTER_LOAD.values()), at_peak)


LEDGER = Ledger(
    device=Device("cuda", "NVIDIA GeForce RTX 4090", 24 * GIB),
    phases=(_phase("load", AFTER_LOAD), _phase("first_step", STEP), _phase("step", STEP)),
    before=MethodPeak("full", "planned", sum(FULL.values()), FULL),
    after=MethodPeak("lora", "measured", sum(STEP.values()), STEP, bits=4),
    planned_peak_bytes=5 * GIB,
    measured_peak_bytes=sum(STEP.values()),
    allocator=Allocator(6 * GIB, 7 * GIB, 8 * GIB),
    instrument="torch's caching allocator",
)


def _timeline() -> tuple[PhaseTrace, ...]:
    """Return traces of the load and of three steps with two micro-batches each.

    Activations grow in each forward pass and shrink in each backward pass.
    """
    clock = itertools.count()
    timeline = Timeline(lambda: next(clock) / 100)
    timeline.begin("load")
    for share in range(1, 50):
        timeline.update({name: size * share // 49 for name, size in AFTER_LOAD.items()})
    timeline.end()
    for step in (1, 2, 30):
        timeline.begin("first_step" if step == 1 else "step")
        timeline.set_step(step)
        for part in ("forward", "backward") * 2:
            timeline.mark(part)
            for share in range(60):
                height = share if part == "forward" else 59 - share
                timeline.update(STEP | {"activations": STEP["activations"] * height // 59})
        timeline.mark("update")
        timeline.update(STEP | {"activations": 0, "loss": 0})
        timeline.end()
    return timeline.traces


TIMELINE = _timeline()
PLAN = PlanResult(
    device={"kind": "cuda"},
    ledger=LEDGER,
    fits=True,
    usable_bytes=23 * GIB,
    floor_bytes=4 * GIB,
    advice=(
        Advice("data.seq_len=512", 300 * MIB, 5 * GIB, True, "", 0.0004, 1.31, "a test's figures"),
    ),
    compare=(Compared("full", 16, sum(FULL.values()), FULL, 1.0),),
    trainable_parameters=6_815_744,
    total_parameters=8_030_261_248,
    adapter_bytes=26 * MIB,
    arithmetic=(Line("checkpoint of the adapter", 13_631_488, "B", "A and B in 16 bit"),),
    notes=("allocated and reserved are modelled",),
    seconds=1.5,
)
TRAIN = TrainResult(Path("runs/x"), 120, 1.234, 1.3, 2413.0, LEDGER, 80, 2.1)
MERGE = MergeResult(Path("runs/x/merged"), "float16", "dequantized", 291, 16 * GIB, "requested")
VERIFY = VerifyResult(True, 0.012, 1e-5, 0.993, (), 61, 64)
EVAL = EvalResult(1.2, 3.32, 10_000, 0.61)
DATA = DataResult(
    rows=100,
    sequences=20,
    tokens=20_000,
    trained_tokens=12_000,
    longest_row=800,
    format="messages",
    shown=(ShownRow("rows.jsonl:7", (("<s>", False), ("Hi", False), (" you", True))),),
    findings=(finding("html", 3, ("rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3")),),
    notes=("3 rows are longer than seq_len",),
)
DOCTOR = DoctorResult((Check("device", "ok", "a CPU"), Check("disk", "limited", "small", "more")))
REPORT = ReportResult(
    run={
        "status": "done",
        "recipe": {
            "model": {"name": "meta-llama/Llama-3.1-8B"},
            "base": {"bits": 4},
            "adapter": {"targets": ["q", "v"]},
            "output": "runs/x",
        },
        "choices": [{"key": "base.compute_dtype", "value": "bfloat16", "reason": "units & <b>"}],
        "versions": {"torch": "2.13.0"},
        "tensors": [{"tensors": "model.norm", "count": 1, "held": "bfloat16", "reason": "small"}],
    },
    ledger=LEDGER,
    metrics=tuple(
        {
            "step": step,
            "loss": 2 * math.exp(-step / 30),
            "tokens": 2048,
            "tokens_per_second": 2400.0 + step,
            "joules": 300.0,
            "peak_bytes": sum(STEP.values()) - step * MIB,
        }
        for step in range(1, 51)
    ),
    timeline=TIMELINE,
    evaluations=tuple(
        {"step": step, "eval_loss": 2.1 * math.exp(-step / 40)} for step in (0, 25, 50)
    ),
)
QUICKSTART = QuickstartResult(
    plan=PLAN,
    train=TRAIN,
    merge=MERGE,
    verify=VERIFY,
    loss_before=2.1,
    loss_after=0.7,
    samples=(("name: Copper Swan\n", "blah", "The Copper Swan is cheap."),),
)
