"""Packed log-probabilities of continuations equal those of transformers, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_cli.errors import NotFinite
from qlora_cli.events import Silent
from qlora_cli.jobs import continuations
from qlora_cli.jobs.continuations import Continuation, ContinuationScore, score_continuations
from qlora_cli.models.model import LoadedModel
from qlora_cli.runs.open import open_model
from tests.helpers.runs import CPU, make_base

LENGTH = 64
"""The model's context."""


def tokens(start: int, length: int) -> list[int]:
    return [3 + (start + 11 * i + i * i) % 250 for i in range(length)]


CONTINUATIONS = [
    *(Continuation(tokens(1, 20), [last]) for last in (5, 6, 7)),
    Continuation(tokens(1, 20), [5, 9]),
    Continuation(tokens(1, 19), [*tokens(1, 20)[19:], 5]),
    Continuation(tokens(2, 80), tokens(3, 6)),
    Continuation(tokens(4, 1), tokens(5, LENGTH)),
    Continuation(tokens(6, 7), tokens(7, 3)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def loaded(base: Path) -> LoadedModel:
    return open_model(base, CPU, Silent())


def reference(base: Path, continuation: Continuation) -> ContinuationScore:
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = [*continuation.context, *continuation.ids][-LENGTH - 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
    logits = logits[-len(continuation.ids) :]
    targets = torch.tensor(continuation.ids)
    chosen = logits.log_softmax(dim=1).gather(1, targets[:, None])
    return ContinuationScore(float(chosen.sum()), bool((logits.argmax(dim=1) == targets).all()))


@pytest.mark.parametrize("max_tokens", [1, 40, 2048])
def test_scores_equal_transformers(
    max_tokens: int, base: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "MAX_TOKENS", max_tokens)
    done: list[int] = []
    scores = score_continuations(loaded, CPU, CONTINUATIONS, LENGTH, done.append)
    for score, continuation in zip(scores, CONTINUATIONS, strict=True):
        wanted = reference(base, continuation)
        assert score.log_probability == pytest.approx(wanted.log_probability, rel=1e-4)
        assert score.is_greedy == wanted.is_greedy
    assert done[-1] == len(CONTINUATIONS)


def test_greedy_continuations_are_recognized(base: Path, loaded: LoadedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    context = tokens(8, 9)
    answer = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)
    ids = answer[0, len(context) :].tolist()
    other = [*ids[:-1], (ids[-1] + 1) % 250]
    given = [Continuation(context, ids), Continuation(context, other)]
    scores = score_continuations(loaded, CPU, given, LENGTH)
    assert [score.is_greedy for score in scores] == [True, False]


def test_a_result_that_is_not_finite_is_an_error(base: Path) -> None:
    damaged = open_model(base, CPU, Silent())
    with torch.no_grad():
        damaged.model.get_submodule("model.norm").weight[0] = torch.nan
    with pytest.raises(NotFinite):
        score_continuations(damaged, CPU, CONTINUATIONS[:1], LENGTH)
