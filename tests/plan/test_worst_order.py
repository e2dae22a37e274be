"""Loading in the order that a plan takes for the worst needs as much as in any other."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from plan_cases import FILE_DTYPE, Case, MadeSource
from plan_measure import Run, facts_of, planned

from qlora_cli.events import Silent
from qlora_cli.memory.instrument import Instrument
from qlora_cli.nn.quant import forget_codes
from qlora_cli.recipe.resolve import DeviceFacts
from qlora_cli.train.state import build_state
from qlora_cli.train.worst_order import worst_order
from qlora_cli.units import GIB
from tests.runs import CPU

FACTS = facts_of("cpu")
CARD = DeviceFacts("cuda", "a card", 24 * GIB, (8, 9), 128)
CASES = [
    Case(family, shape, tuple(text.split()), vocab_size, tied)
    for family, shape, vocab_size, tied, text in (
        # A matrix while it is packed needs more than the table while it is cast.
        ("llama", "tiny", 2048, True, "base.quant_type=fp4 base.compute_dtype=bfloat16"),
        # The table more than any matrix.
        ("llama", "tiny", 32000, True, "base.compute_dtype=bfloat16"),
        ("qwen2", "tiny", 259, False, "base.bits=8"),
        ("gpt2", "tiny", 259, True, "base.bits=16 base.compute_dtype=float16"),
        ("mistral", "tiny", 2048, False, "base.bits=16 adapter.method=full"),
    )
]


def load_peak(case: Case, order: Sequence[str]) -> int:
    """Of the real job, from a file with its tensors in this order."""
    run, instrument = Run.of(case, FACTS), Instrument(CPU)
    forget_codes(run.device)  # A job makes them once; so does each of these.

    class Ordered(MadeSource):
        def names(self) -> Sequence[str]:
            assert sorted(order) == sorted(self._shapes)
            return order

    with instrument.phase("load"):
        build_state(
            run.recipe,
            run.config,
            lambda model, family: Ordered(model, family, touched=True),
            run.device,
            Silent(),
            FILE_DTYPE,
        )
    return instrument.phases[0].peak_bytes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_no_order_of_a_file_needs_more_than_the_worst(case: Case) -> None:
    run = Run.of(case, FACTS)
    worst = list(worst_order(run.recipe, run.config, FACTS, FILE_DTYPE))
    most = load_peak(case, worst)
    plan = next(phase for phase in planned(case, FACTS).phases if phase.name == "load")
    assert plan.peak_bytes == most
    shuffled = [random.Random(seed).sample(worst, len(worst)) for seed in range(4)]
    others = [load_peak(case, order) for order in (worst[::-1], sorted(worst), *shuffled)]
    assert max(others) <= most
    assert min(others) < most, "an order matters in each of these cases"


@pytest.mark.parametrize("bits", [4, 16])
def test_a_card_never_holds_a_head_twice(bits: int) -> None:
    """The file is in float16, the head is held in bfloat16: it is cast on the host."""
    case = Case(
        "llama",
        "tiny",
        (f"base.bits={bits}", "base.compute_dtype=bfloat16", "data.seq_len=64"),
        32000,
    )
    load, *_ = planned(case, CARD).phases
    assert load.name == "load"
    head_bytes = 2 * 32000 * 192
    assert load.at_peak["head"] >= head_bytes  # The allocator rounds up.
    assert load.peak_bytes - load.live_bytes < head_bytes / 4
