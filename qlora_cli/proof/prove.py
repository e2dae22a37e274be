"""Proves that this package trains, plans and merges a model type correctly, on a small model of it.

The proof runs at the first use of a model type that has no hand-written family, and takes some
seconds on a CPU. Its result is kept in the cache, by the config and the versions of the libraries.
Hand-written families obey the same laws in the test suite.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError, QloraError
from qlora_cli.events import Observer
from qlora_cli.files import cache
from qlora_cli.files.atomic import atomic_folder, write_json
from qlora_cli.files.composed import model_type_of
from qlora_cli.files.locate import find_config, read_config
from qlora_cli.models.build import skeleton
from qlora_cli.models.classifier import check_classifier
from qlora_cli.models.progress_bars import without_progress_bars
from qlora_cli.models.registry import known_family, refuse_by_name, unsupported
from qlora_cli.proof import job_laws, laws
from qlora_cli.proof.small_model import SmallModel, small_model
from qlora_cli.recipe.classification import Classification
from qlora_cli.runs.run import Run
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.tasks.classification import CLASSIFICATION, ClassificationTask, task_of_model
from qlora_cli.tasks.task import Task
from qlora_cli.units import format_duration

_PLAN = 0.01
_SEPARATE = 1e-3
_RESULT = "proof.json"
_PROVED_CLASSIFIER = ClassificationTask(Classification(kind="classes", labels=["a", "b", "c"]))


@dataclass(frozen=True)
class Law:
    """One law. limit: largest value that obeys it, or the smallest one if `is_lower_bound`."""

    name: str
    text: str
    measure: Callable[[SmallModel], float]
    limit: float = laws.EXACT
    is_lower_bound: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a measured value obeys the law."""
        return value >= self.limit if self.is_lower_bound else value <= self.limit


LAWS = (
    Law("logits", "the logits are those of transformers", laws.logits),
    Law("packing", "packed rows give the logits of each row alone", laws.packing),
    Law("leak", "rows without limits give other logits", laws.leak, _SEPARATE, True),
    Law("gradients", "the gradients of A and B are those through W + sBA", laws.gradients),
    Law("checkpointing", "checkpointing changes no bit of a gradient", laws.checkpointing, 0.0),
    Law("quantized", "4-bit logits are those of the dequantized weights", laws.quantized),
    Law("plan", "the planned peak memory is the measured one", job_laws.plan, _PLAN),
    Law("merge", "transformers loads the merge, and it is W + sBA", job_laws.merge),
)


@dataclass(frozen=True)
class LawResult:
    """The measured value of a law. error: the error that ended it; then value is None."""

    law: str
    value: float | None
    holds: bool
    error: str | None = None


@dataclass(frozen=True)
class ModelProof:
    """The proof of one model type.

    seconds: time that it took. versions: of the libraries that it depends on. task: whose class
    was proved. A proof stops at the first law that does not hold.
    """

    model_type: str
    results: tuple[LawResult, ...]
    seconds: float
    versions: Mapping[str, str]
    task: str = "causal"

    @property
    def failed(self) -> LawResult | None:
        """The law that does not hold; None if all hold."""
        return next((result for result in self.results if not result.holds), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the content for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelProof:
        """Return the proof of `to_dict`. Raises KeyError or TypeError if the content is damaged."""
        results = tuple(LawResult(**result) for result in content["results"])
        return cls(**{**content, "results": results})


def require_proof(config: Any, task: Task, observer: Observer) -> ModelProof | None:
    """Prove the model type of `config`, or read its proof from the cache.

    config: transformers' config of the base. Returns None for a hand-written family, which the
    tests prove. Raises ModelError if a law does not hold.
    """
    if known_family(config) is not None:
        return None
    proof = proof_of(config, task, observer)
    if (failed := proof.failed) is not None:
        raise _refusal(config, failed)
    return proof


def require_proof_of_model(where: str, observer: Observer) -> None:
    """Prove the model type of a model that is not a run. A run was proved when it was trained.

    where: a run's folder, a model's folder or a hub id. Raises ModelError as `require_proof` does.
    """
    if Run.find(where) is None:
        config = read_config(find_config(where, None))
        require_proof(config, task_of_model(config) or CAUSAL, observer)


def proof_of(config: Any, task: Task, observer: Observer) -> ModelProof:
    """Return the proof of the model type of `config`, from the cache or new.

    Raises ModelError if no family can describe the type, or no small model of it can be made.
    """
    refuse_by_name(config)
    is_classifier = task.name == CLASSIFICATION.name
    if is_classifier:
        check_classifier(config)
    # Preference pairs train the class of causal models. The labels of a classifier do not matter.
    task = _PROVED_CLASSIFIER if is_classifier else CAUSAL
    parts: dict[str, Any] = {"config": config.to_json_string(), "versions": _versions()}
    key = cache.key_of(parts | ({"task": task.name} if is_classifier else {}))
    folder = cache.entry_folder(cache.PROOFS, key)
    if (stored := _read(folder / _RESULT)) is not None:
        return stored
    observer.note(f"model type {model_type_of(config)}: first use; proving it on a small model")
    proof = _prove(config, task)
    # Without a writable cache the proof runs again at the next use.
    with suppress(OSError), cache.locked(folder), atomic_folder(folder) as partial:
        write_json(partial / _RESULT, proof.to_dict())
        write_json(partial / cache.ENTRY, {"description": model_type_of(config)})
    if proof.failed is None:
        observer.note(
            f"model type {model_type_of(config)}: {len(proof.results)} laws hold "
            f"({format_duration(proof.seconds)})"
        )
    return proof


def stored_proofs() -> list[ModelProof]:
    """Return the proofs in the cache that are of the installed versions, by model type."""
    entries = [entry for entry in cache.entries() if entry.kind == cache.PROOFS]
    folders = [cache.entry_folder(entry.kind, entry.key) for entry in entries]
    proofs = (_read(folder / _RESULT) for folder in folders)
    current = [proof for proof in proofs if proof is not None and proof.versions == _versions()]
    return sorted(current, key=lambda proof: (proof.model_type, proof.task))


def _prove(config: Any, task: Task) -> ModelProof:
    started = time.perf_counter()
    # The random numbers of the job must not depend on whether a proof ran before it.
    with (
        torch.random.fork_rng(devices=[]),
        without_progress_bars(),
        small_model(config, task) as small,
    ):
        # A type that no family can describe is refused for this reason, and not by a law.
        skeleton(small.config, torch.float32, task.model_class)
        results = tuple(_until_failure(small, LAWS))
    seconds = time.perf_counter() - started
    return ModelProof(model_type_of(config), results, seconds, _versions(), task.name)


def _until_failure(small: SmallModel, checked: Sequence[Law]) -> list[LawResult]:
    results: list[LawResult] = []
    for law in checked:
        results.append(_check(small, law))
        if not results[-1].holds:
            break
    return results


def _check(small: SmallModel, law: Law) -> LawResult:
    try:
        value = law.measure(small)
    except QloraError as error:
        return LawResult(law.name, None, False, str(error).splitlines()[0])
    except Exception as error:  # Code of any model class runs here: each error refuses the type.
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return LawResult(law.name, None, False, text)
    return LawResult(law.name, value, law.holds(value))


def _refusal(config: Any, failed: LawResult) -> ModelError:
    law = next(law for law in LAWS if law.name == failed.law)
    found = failed.error or f"{failed.value:.1e}, and the limit is {law.limit:.0e}"
    return unsupported(config, f"on a small model it is not true that {law.text} ({found})")


def _versions() -> dict[str, str]:
    names = ("transformers", "torch", "bitsandbytes", "qlora-cli")
    return {name: importlib.metadata.version(name) for name in names}


def _read(file: Path) -> ModelProof | None:
    """Return a stored proof; None if there is none or it is damaged."""
    try:
        return ModelProof.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
