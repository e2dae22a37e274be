"""`qlora eval --tasks`: the tasks of lm-eval (EleutherAI's evaluation harness)."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.jobs.open_generator import open_generator
from qlora_cli.jobs.prompt_format import PromptFormat
from qlora_cli.jobs.task_results import TaskScore, TasksResult
from qlora_cli.jobs.text_generator import TextGenerator

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_SIMILAR = 3
"""Number of similar names in the error about an unknown task."""
_TASKS = "--tasks"


@dataclass(frozen=True)
class TaskOptions:
    """What to evaluate.

    names: tasks, groups, tags or patterns such as `mmlu_*`. num_fewshot: examples before each
    question; None for the number in the task. limit: rows of each task; None for all.
    include_path: a folder with further tasks in YAML files. chat_template: format prompts with it.
    """

    names: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: Path | None = None
    chat_template: bool = False


def run(where: str, options: TaskOptions, observer: Observer) -> TasksResult:
    """Evaluate a run or a model on tasks of lm-eval.

    where: a run's folder, a model's folder or a Hub id. A run is evaluated as it was trained: the
    adapter on the quantized base. Raises UsageError if lm-eval is not installed, a task is unknown,
    its data cannot be loaded or an option does not fit it, and the errors of `open_generator`.
    """
    _check_installed()
    # Before the model, which takes longer, so that a wrong name is found at once.
    tasks = _load(options, observer)
    _set_fewshot(tasks["tasks"], options.num_fewshot)
    generator = open_generator(where, observer)
    prompt = _prompt(generator, options.chat_template)
    return _evaluate(generator, prompt, tasks, options, observer)


def _check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise UsageError(
            "evaluating tasks needs the lm-eval package, which is not installed",
            where=_TASKS,
            hint="pip install 'qlora-cli[eval]'",
        )


def _load(options: TaskOptions, observer: Observer) -> Mapping[str, Any]:
    """Return lm-eval's dictionary of the tasks and groups. Raises UsageError."""
    # lm-eval reports each step of its own work; errors are raised.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    observer.stage("load tasks", 1)
    manager = _manager(options)
    names = _known_names(manager, options.names)
    try:
        tasks: Mapping[str, Any] = manager.load(names)
    # A task is foreign code: templates and functions of its YAML, its data's loader, the network.
    except Exception as error:
        raise UsageError(
            f"{', '.join(names)}: the task or its data cannot be loaded: {_first_line(error)}",
            where=_TASKS,
            hint="data of built-in tasks come from the Hugging Face Hub: check the network and "
            "HF_HUB_OFFLINE; a task of your own is a YAML file in the folder of --include-path",
        ) from error
    for name, task in tasks["tasks"].items():
        _check_task(name, task)
    observer.advance(1)
    return tasks


def _manager(options: TaskOptions) -> TaskManager:
    """Return lm-eval's index of tasks: of the user's folder if it is enough, else of all.

    The index of the built-in tasks takes seconds. The tasks of a group may be built-in ones.
    """
    from lm_eval.tasks import TaskManager

    folder = options.include_path
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(options.names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _known_names(manager: TaskManager, names: tuple[str, ...]) -> list[str]:
    """Return the names of tasks that the names and patterns match. Raises UsageError."""
    found: list[str] = []
    for name in names:
        matched = manager.match_tasks([name])
        if not matched:
            near = difflib.get_close_matches(name, manager.all_tasks, n=_SIMILAR)
            raise UsageError(
                f"there is no task {name!r}",
                where=_TASKS,
                hint=f"did you mean {', '.join(near)}?"
                if near
                else "`lm-eval ls tasks` lists them; --include-path names a folder of your own",
            )
        found += (match for match in matched if match not in found)
    return found


def _check_task(name: str, task: Any) -> None:
    """Raise UsageError if a task cannot be evaluated here."""
    if getattr(task, "UNSAFE_CODE", False) or task.get_config("unsafe_code"):
        raise UsageError(
            f"the task {name} runs code that the model writes, which qlora does not do",
            where=_TASKS,
            hint="evaluate the merged model with lm-eval's own command",
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"the task {name} is about images or sound", where=_TASKS)
    if task.get_config("output_type") == "generate_until":
        from qlora_cli.jobs.lm_eval_model import AnswerSettings

        AnswerSettings.of(task.get_config("generation_kwargs") or {}, name)


def _set_fewshot(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Set the number of examples before each question, as lm-eval's command does.

    Raises UsageError if a task allows none.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if num_fewshot and own == 0:
            raise UsageError(
                f"the task {name} allows no examples before a question", where="--num-fewshot"
            )
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _prompt(generator: TextGenerator, chat_template: bool) -> PromptFormat:
    """Return how prompts are formatted. Raises UsageError if there is no chat template."""
    source = generator.prompt_source(generator.switch.current)
    if not chat_template:
        return PromptFormat("plain", source.tokenizer, "")
    if not source.tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template", where="--apply-chat-template")
    system = None if source.run is None else source.run.recipe.data.system
    return PromptFormat("chat", source.tokenizer, "", system)


def _evaluate(
    generator: TextGenerator,
    prompt: PromptFormat,
    tasks: Mapping[str, Any],
    options: TaskOptions,
    observer: Observer,
) -> TasksResult:
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    from qlora_cli.jobs.lm_eval_model import GeneratorLM

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    results = evaluate(
        GeneratorLM(generator, prompt, observer),
        tasks,
        limit=options.limit,
        log_samples=False,
        apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.chat_template,
    )
    assert results is not None  # None only on the other processes of a distributed evaluation.
    return TasksResult(_scores(results), lm_eval.__version__, options.limit, options.chat_template)


def _scores(results: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """Return the metrics of lm-eval's results, groups first."""
    scores = []
    entries = {**results.get("groups", {}), **results["results"]}
    for name, metrics in entries.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            version = results["versions"].get(name)
            scores.append(
                TaskScore(
                    task=name,
                    metric=metric,
                    filter=chosen,
                    value=value,
                    stderr=stderr if isinstance(stderr, float) else None,
                    higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
                    num_fewshot=results["n-shot"].get(name),
                    samples=results["n-samples"].get(name, {}).get("effective"),
                    version=None if version is None else str(version),
                )
            )
    return tuple(scores)


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0]
