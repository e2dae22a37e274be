"""`qlora eval --tasks` gives the figures of lm-eval's own model for transformers.

A run is compared with its merged model in float32, merged onto the dequantized base: both compute
the same function. The tasks are local files, because the tests use no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import UsageError
from qlora_cli.events import Silent
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.jobs.eval_tasks import TaskOptions, run
from qlora_cli.jobs.open_generator import open_generator
from qlora_cli.jobs.prompt_format import PromptFormat
from qlora_cli.runs.run import Run
from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import CPU, make_recipe, make_rows, make_run
from tests.helpers.vocabularies import byte_level_of, make_model_with_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval (the extra `eval`)")
# lm-eval, evaluate and sqlitedict use what is deprecated in their dependencies.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAMES = ("own_choice", "own_answer", "own_text")
QUESTIONS = [
    {"text": text, "choices": [" fox", " the dogs", " a", "3"], "label": number % 4}
    for number, text in enumerate(
        ["The quick brown", "the then there", "  Two  spaces, a ", "three 3.14", "I'LL see:", "an"]
    )
]
TASKS: Mapping[str, Mapping[str, Any]] = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "generation_kwargs": {"until": ["the", "</s>"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "own_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        # Longer than the model's context of 64 tokens, so that there are several windows.
        "doc_to_target": "{{text * 12}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_tasks(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """Write the tasks and their rows. changes: task -> settings that differ."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, settings in TASKS.items():
        files = {"data_files": {"test": str(rows)}}
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": files}
        content |= {"test_split": "test", "metadata": {"version": 1.0}, **settings}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(content | changes.get(name, {})))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `run`, its merged model `merged` in float32 and the tasks `tasks`."""
    folder = tmp_path_factory.mktemp("lm-eval")
    base = make_model_with_tokenizer(folder / "base", "llama", byte_level_of("gpt-2"))
    trained, _ = make_run(folder / "run", make_recipe(base, make_rows(folder / "rows.jsonl")))
    tensors = open_merged_tensors(Run(trained.path), "dequantized", torch.float32, CPU)
    write_merged(tensors, base, folder / "merged", {}, Silent())
    write_tasks(folder / "tasks")
    return folder


def evaluate(model: Any, folder: Path, **options: Any) -> Any:
    """Return lm-eval's results with every sample."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return simple_evaluate(model, tasks=list(NAMES), task_manager=manager, **options)


@cache
def own_results(folder: Path, name: str, chat: bool) -> Any:
    from qlora_cli.jobs.lm_eval_model import GeneratorLM

    generator = open_generator(str(folder / name), Silent())
    prompt = PromptFormat("chat" if chat else "plain", generator.tokenizer, "")
    model = GeneratorLM(generator, prompt, Silent())
    return evaluate(model, folder, num_fewshot=2, apply_chat_template=chat)


@cache
def reference_results(folder: Path, chat: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(str(folder / "merged"), dtype="float32", device="cpu", batch_size=1)
    return evaluate(model, folder, num_fewshot=2, apply_chat_template=chat)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", ["run", "merged"])
def test_every_answer_equals_that_of_lm_evals_own_model(
    name: str, chat: bool, folder: Path
) -> None:
    own, wanted = own_results(folder, name, chat), reference_results(folder, chat)
    for task in NAMES:
        pairs = list(zip(own["samples"][task], wanted["samples"][task], strict=True))
        assert len(pairs) == len(QUESTIONS)
        for found, reference in pairs:
            assert found["arguments"] == reference["arguments"]
            assert_same(found["resps"], reference["resps"])
        figures = {key: value for key, value in wanted["results"][task].items() if "," in key}
        for key, value in figures.items():
            assert_same(own["results"][task][key], value)


def assert_same(found: Any, reference: Any) -> None:
    """Compare nested lists of log-probabilities, flags and texts."""
    if isinstance(reference, list | tuple):
        assert len(found) == len(reference)
        for one, other in zip(found, reference, strict=True):
            assert_same(one, other)
    elif isinstance(reference, float):
        assert found == pytest.approx(reference, rel=1e-4, abs=1e-4)
    else:
        assert found == reference


def test_the_comparison_detects_another_adapter(folder: Path, tmp_path: Path) -> None:
    recipe = Run(folder / "run").recipe
    make_run(tmp_path / "run", recipe, seed=4)
    (tmp_path / "tasks").symlink_to(folder / "tasks")
    own, wanted = own_results(tmp_path, "run", False), reference_results(folder, False)
    with pytest.raises(AssertionError):
        assert_same(
            [sample["resps"] for sample in own["samples"]["own_choice"]],
            [sample["resps"] for sample in wanted["samples"]["own_choice"]],
        )


def test_the_command_prints_the_scores(folder: Path) -> None:
    arguments = ("eval", folder / "run", "--tasks", "own_choice, own_answer")
    arguments += ("--include-path", folder / "tasks", "--num-fewshot", "2")
    outcome = qlora(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    scores = {(score["task"], score["metric"]): score for score in outcome.json["scores"]}
    wanted = reference_results(folder, False)["results"]["own_choice"]
    accuracy = scores["own_choice", "acc"]
    assert accuracy["value"] == wanted["acc,none"]
    assert accuracy["stderr"] == pytest.approx(wanted["acc_stderr,none"])
    assert accuracy["num_fewshot"] == 2
    assert accuracy["samples"] == len(QUESTIONS)
    assert ("own_answer", "exact_match") in scores
    outcome = qlora(*arguments, "--limit", "3")
    assert outcome.code == 0, outcome.err
    assert "own_choice" in outcome.out
    assert "the first 3 rows of each task only" in outcome.out


def test_an_unknown_task_is_refused_with_similar_names(folder: Path) -> None:
    outcome = qlora("eval", "nothing", "--tasks", "own_choise", "--include-path", folder / "tasks")
    assert outcome.code == 2
    assert "there is no task 'own_choise'" in outcome.err
    assert "did you mean own_choice" in outcome.err


@pytest.mark.parametrize(
    ("task", "change", "options", "message"),
    [
        ("own_choice", {"num_fewshot": 0}, {"num_fewshot": 1}, "allows no examples"),
        ("own_answer", {"generation_kwargs": {"num_beams": 2}}, {}, "num_beams"),
        ("own_choice", {"doc_to_text": "{{ text | nothing }}"}, {}, "No filter named"),
        ("own_choice", {"unsafe_code": True}, {}, "runs code that the model writes"),
        ("own_text", {"dataset_kwargs": {"data_files": {"test": "absent"}}}, {}, "be loaded"),
    ],
)
def test_a_task_that_cannot_be_evaluated_is_refused_before_the_model_is_opened(
    task: str, change: Mapping[str, Any], options: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    tasks = write_tasks(tmp_path / "tasks", **{task: change})
    with pytest.raises(UsageError, match=message):
        run("nothing", TaskOptions((task,), include_path=tasks, **options), Silent())


def test_answers_longer_than_the_context_are_refused(folder: Path, tmp_path: Path) -> None:
    change = {"own_answer": {"generation_kwargs": {"until": ["x"], "max_gen_toks": 64}}}
    tasks = write_tasks(tmp_path / "tasks", **change)
    options = TaskOptions(("own_answer",), include_path=tasks)
    with pytest.raises(UsageError, match="context of 64"):
        run(str(folder / "merged"), options, Silent())
