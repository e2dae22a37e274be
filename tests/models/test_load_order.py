"""A base is loaded in the model's order and not in the file's, so its plan is exact."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from plan_cases import Case, SyntheticSource
from plan_measure import Run, plan_case, profile_of_kind

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.instrument import Instrument
from qlora_cli.models.build import ModelRequest
from qlora_cli.nn.codebook import clear_scale_codebook
from qlora_cli.train.state import build_state
from qlora_cli.units import GIB
from tests.helpers.runs import CPU

PROFILE = profile_of_kind("cpu")
GPU = DeviceProfile("cuda", "a GPU", 24 * GIB, (8, 9), 128)
CASES = [
    Case(family, shape, tuple(text.split()), vocab_size, tied)
    for family, shape, vocab_size, tied, text in (
        ("llama", "tiny", 2048, True, "base.quant_type=fp4 base.compute_dtype=bfloat16"),
        ("llama", "tiny", 32000, True, "base.compute_dtype=bfloat16"),
        ("qwen2", "tiny", 259, False, "base.bits=8"),
        ("gpt2", "tiny", 259, True, "base.bits=16 base.compute_dtype=float16"),
        ("gpt2", "tiny", 259, True, "base.bits=8"),
        ("mistral", "tiny", 2048, False, "base.bits=16 adapter.method=full"),
    )
]


class Shuffled(SyntheticSource):
    """A checkpoint with its tensors in a random order; records the order in which they are read."""

    def __init__(self, model: object, family: object, seed: int) -> None:
        super().__init__(model, family, with_values=True)  # type: ignore[arg-type]
        self.seed = seed
        self.read_names: list[str] = []

    def names(self) -> Sequence[str]:
        names = super().names()
        return random.Random(self.seed).sample(names, len(names))

    def read(self, name: str) -> object:  # type: ignore[override]
        self.read_names.append(name)
        return super().read(name)


def loaded(case: Case, seed: int) -> tuple[int, list[str]]:
    """Return (peak bytes of loading in a real job, the names in the order of reading)."""
    run, instrument = Run.of(case, PROFILE), Instrument(CPU, PROFILE)
    clear_scale_codebook(run.device)  # So that every call allocates the codebook, as a job does.
    sources: list[Shuffled] = []

    def source(model: object, family: object) -> Shuffled:
        sources.append(Shuffled(model, family, seed))
        return sources[0]

    with instrument.phase("load"):
        build_state(ModelRequest(run.recipe, run.config, source, run.device, PROFILE))
    return instrument.phases[0].peak_bytes, sources[0].read_names


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_the_order_of_a_file_has_no_effect(case: Case) -> None:
    plan = next(phase for phase in plan_case(case, PROFILE).phases if phase.name == "load")
    for seed in range(3):
        peak, names = loaded(case, seed)
        assert peak == plan.peak_bytes
        assert names == loaded(case, 3)[1]


def test_tables_come_first_and_blocks_in_order() -> None:
    case = Case("llama", "tiny", (), 32000, tied=False)
    _, names = loaded(case, 0)
    tables, rest = names[:2], names[3:]
    assert set(tables) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert names[2] == "model.norm.weight"
    blocks = [int(name.split(".")[2]) for name in rest]
    assert blocks == sorted(blocks)
    assert set(blocks) == {0, 1, 2}


@pytest.mark.parametrize("bits", [4, 16])
def test_a_gpu_never_stores_a_head_twice(bits: int) -> None:
    """The file is in float16 and the head is stored in bfloat16: it is cast on the CPU."""
    case = Case(
        "llama",
        "tiny",
        (f"base.bits={bits}", "base.compute_dtype=bfloat16", "data.seq_len=64"),
        32000,
    )
    load, *_ = plan_case(case, GPU).phases
    assert load.name == "load"
    head_bytes = 2 * 32000 * 192
    assert load.at_peak["head"] >= head_bytes  # The allocator rounds up.
    assert load.peak_bytes - load.live_bytes < head_bytes / 4


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_are_transposed_before_they_are_copied_to_a_gpu(bits: int) -> None:
    """GPT-2's file stores (in, out); transposing on the GPU would need the weight twice."""
    peaks = {}
    for family in ("gpt2", "llama"):
        case = Case(family, "tiny", (f"base.bits={bits}", "data.seq_len=64"), 259, tied=True)
        load, *_ = plan_case(case, GPU).phases
        peaks[family] = load.at_peak.get("temporary", 0)
    # GPT-2's largest matrix is 192 x 768, Llama's 192 x 512.
    assert peaks["gpt2"] <= 1.6 * peaks["llama"]
