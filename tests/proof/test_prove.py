"""The proof of a model type: what passes, what is refused with which law, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora_cli.errors import ModelError
from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.files.composed import language_config
from qlora_cli.models.derive import derive_family
from qlora_cli.models.family import Family
from qlora_cli.nn import attention
from qlora_cli.nn.logits import IDENTITY, LogitTransform
from qlora_cli.proof import laws, prove
from qlora_cli.proof.small_model import SmallModel, small_model
from qlora_cli.recipe.classification import Classification
from qlora_cli.tasks import causal
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.tasks.classification import ClassificationTask
from tests.helpers.observers import NoteRecorder
from tests.helpers.type_settings import PROVED_SETTINGS

PROVED = {
    "phi3": "fused projections",
    "olmo2": "norms after the parts of a block",
    "starcoder2": "an MLP without a gate",
    "smollm3": "layers without rotary positions",
    "glm4": "partial rotary positions",
    "seed_oss": "biases",
    "cwm": "sliding windows",
    "cohere": "scaled logits",
    "gemma2": "soft caps on scores and logits",
    "gemma3_text": "a scaled token table, in a buffer",
    "gemma4_text": "sizes per layer, buffers in the checkpoint",
    "phi": "a head with a bias",
    "opt": "a position table of its own",
    "bloom": "own attention, with a mask",
    "gpt_neox": "tensors that transformers renames",
    "gpt_neox_japanese": "blocks that differ, no checkpointing of its own",
    "stablelm": "arguments that do not reach the attention",
    "minicpm3": "values of another size than keys",
    "gptj": "a position in a table of the attention",
    "qwen3_5_text": "linear attention in some blocks",
    "qwen3_moe": "experts, stored one by one",
    "gpt_oss": "experts with biases, stored as stacks; attention sinks",
    "deepseek_v3": "a block without experts, shared experts, values of another size than keys",
    "qwen3_next": "experts and linear attention",
    "mamba2": "a state-space model, linears that the code reads",
    "roberta": "code before the head, a bias with two names, positions after padding",
    "bart": "a position table that counts, linears that are never called",
    "falcon": "a subclass of nn.Linear, a mask that the model makes",
    "lfm2": "convolutions",
    "deepseek_v32": "attention that chooses its keys",
    "llama4_text": "attention in chunks, experts that stay in 16 bit",
    "olmo_hybrid": "a convolution that the checkpoint stores in parts",
    "zamba2": "blocks that share weights",
    "cpmant": "tokens that the model adds: rows one at a time",
    "dbrx": "experts with code of their own, in matrices",
    "longcat_flash": "experts that return their input, stacks that the checkpoint stores in parts",
    "jetmoe": "experts in the attention",
    "xmod": "a language for all rows",
    "inkling_text": "attention with a bias, convolutions that ask for padding",
    "qwen4_exp_text": "attention that chooses blocks of keys",
    "git": "parts for images inside the language model",
    "xlstm": "a recurrence whose gradients float64 decides",
}
"""Model type -> the mechanism that it needs."""
COMPOSED = ["qwen3_vl", "qwen3_5"]
"""Types of vision and text."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has an empty cache."""
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small() -> Iterator[SmallModel]:
    """A small model of a type with grouped heads and a sliding window in one of two layers."""
    with small_model(AutoConfig.for_model("cwm"), CAUSAL) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PROVED)
def test_a_model_type_obeys_every_law(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **PROVED_SETTINGS.get(model_type, {}))
    proof = prove.proof_of(config, CAUSAL, Silent())
    assert proof.failed is None, proof.failed
    assert [result.law for result in proof.results] == [law.name for law in prove.LAWS]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", COMPOSED)
def test_the_language_model_of_a_composed_model_obeys_every_law(model_type: str) -> None:
    config = language_config(AutoConfig.for_model(model_type))
    proof = prove.proof_of(config, CAUSAL, Silent())
    assert proof.failed is None, proof.failed
    assert proof.model_type == model_type


def test_a_type_that_breaks_a_law_is_refused_with_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qlora_cli.models.build.derive_family",
        lambda model: replace(derive_family(model), logits=LogitTransform(2.0)),
    )
    config = AutoConfig.for_model("olmo2")
    proof = prove.proof_of(config, CAUSAL, Silent())
    assert proof.failed is not None
    assert proof.failed.law == "logits"
    with pytest.raises(ModelError, match="'olmo2' is not supported: on a small model"):
        prove.require_proof(config, CAUSAL, Silent())


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("roberta", "is_decoder: true"),
        ("xlnet", "it has no causal attention"),
        ("hrm_text", "one list of blocks is needed"),
        ("xmod", "must name the language of the rows, one of en_XX"),
        ("inkling2_text", "in the order of its rows"),
    ],
)
def test_what_a_family_cannot_describe_is_refused_with_the_reason(
    model_type: str, reason: str
) -> None:
    settings = {"is_decoder": True} if model_type == "xmod" else {}
    config = AutoConfig.for_model(model_type, **settings)
    with pytest.raises(ModelError, match=reason):
        prove.require_proof(config, CAUSAL, Silent())


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gemma3", "'gemma3' has several parts"), ("git", "no class that classifies texts")],
)
def test_a_classifier_that_does_not_exist_is_refused_with_what_to_use(
    model_type: str, reason: str
) -> None:
    config = language_config(AutoConfig.for_model(model_type))
    task = ClassificationTask(Classification(kind="classes", labels=["a", "b"]))
    with pytest.raises(ModelError, match=reason) as refusal:
        prove.require_proof(config, task, Silent())
    assert "task: causal" in str(refusal.value)


def test_a_proof_is_kept_and_read_back() -> None:
    config = AutoConfig.for_model("olmo2")
    first, second = NoteRecorder(), NoteRecorder()
    proof = prove.proof_of(config, CAUSAL, first)
    assert prove.proof_of(config, CAUSAL, second) == proof
    assert "first use" in first.notes[0]
    assert not second.notes
    assert prove.stored_proofs() == [proof]
    (entry,) = cache.entries()
    assert (entry.kind, entry.description) == (cache.PROOFS, "olmo2")


def test_a_proof_does_not_change_the_random_numbers_of_the_job() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prove.proof_of(AutoConfig.for_model("olmo2"), CAUSAL, Silent())
    assert torch.equal(torch.rand(3), expected)


def test_hand_written_families_are_not_proved_at_run_time() -> None:
    assert prove.require_proof(AutoConfig.for_model("llama"), CAUSAL, Silent()) is None


def _attend_with(**changes: Any) -> Any:
    original = attention.attend

    def attend(*args: Any, **settings: Any) -> Any:
        return original(*args, **{**settings, **changes})

    return attend


@pytest.mark.parametrize("changes", [{"sliding_window": None}, {"scaling": 0.5}])
def test_a_wrong_attention_is_detected(small: SmallModel, changes: dict[str, Any]) -> None:
    attention.AttentionInterface.register(attention.NAME, _attend_with(**changes))
    try:
        assert laws.logits(small) > 1e-3
    finally:
        attention.AttentionInterface.register(attention.NAME, attention.attend)
    assert laws.logits(small) < 1e-5


def test_rows_that_attend_to_each_other_are_detected(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert laws.packing(small) < 1e-5
    monkeypatch.setattr("qlora_cli.tasks.backbone.use_spans", lambda _: nullcontext())
    assert laws.packing(small) > 1e-3


def _changed(family: Family, changes: dict[str, Any]) -> Family:
    """Return a family with other values of fields, or of fields of `rows`."""
    rows = replace(family.rows, **changes.get("rows", {}))
    return replace(family, **{**changes, "rows": rows})


@pytest.mark.parametrize(
    ("model_type", "changes", "law"),
    [
        ("cohere", {"logits": IDENTITY}, "logits"),
        ("gemma2", {"logits": IDENTITY}, "logits"),
        ("gemma3_text", {"embedding_scale": 2.0}, "logits"),
        ("qwen3_5_text", {"rows": {"mixers": ()}}, "packing"),
        ("openai-gpt", {"rows": {"mixers": ()}}, "packing"),
    ],
)
def test_a_fault_in_a_derived_family_is_detected(
    model_type: str, changes: dict[str, Any], law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qlora_cli.models.build.derive_family",
        lambda model: _changed(derive_family(model), changes),
    )
    with small_model(AutoConfig.for_model(model_type), CAUSAL) as faulty:
        assert getattr(laws, law)(faulty) > 1e-3


def test_a_soft_cap_that_the_attention_ignores_is_detected() -> None:
    ignoring = _attend_with(softcap=None)
    with small_model(AutoConfig.for_model("gemma2"), CAUSAL) as capped:
        assert laws.logits(capped) < 1e-5
        attention.AttentionInterface.register(attention.NAME, ignoring)
        try:
            assert laws.logits(capped) > 1e-3
        finally:
            attention.AttentionInterface.register(attention.NAME, attention.attend)


def test_swapped_experts_are_detected() -> None:
    with small_model(AutoConfig.for_model("mixtral"), CAUSAL) as routed:
        assert laws.logits(routed) < 1e-5
        experts = routed.loaded.model.model.layers[0].mlp.experts.down_proj.base
        experts[0], experts[1] = experts[1], experts[0]
        assert laws.logits(routed) > 1e-3


def test_a_loss_without_the_bias_of_the_head_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    original = causal.head_of
    with small_model(AutoConfig.for_model("phi"), CAUSAL) as biased:
        assert laws.gradients(biased) < 1e-5
        monkeypatch.setattr(causal, "head_of", lambda loaded: (original(loaded)[0], None, IDENTITY))
        assert laws.gradients(biased) > 1e-3


def test_a_wrong_scaling_of_the_adapter_is_detected(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert laws.gradients(small) < 1e-5
    monkeypatch.setattr(
        "qlora_cli.adapters.lora.LoraLinear.delta",
        lambda layer: torch.zeros(layer.base.out_features, layer.base.in_features),
    )
    assert laws.gradients(small) > 1e-3
