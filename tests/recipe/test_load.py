"""Loading a recipe: values, defaults, and every problem at once with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import Problem, RecipeError, UsageError
from qlora_cli.recipe import validation
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.shipped import shipped_recipes

Write = Callable[[str], Path]
GOOD = "model: {name: starter}\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a recipe file."""

    def to_file(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return to_file


def problems(path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return list(caught.value.problems)


def only_problem(path: Path, *overrides: str) -> Problem:
    (problem,) = problems(path, *overrides)
    return problem


def test_a_minimal_recipe_has_the_defaults(write: Write) -> None:
    recipe = load_recipe(write(GOOD))
    assert (recipe.base.bits, recipe.adapter.targets, recipe.train.lr) == (4, ["q", "v"], 2e-4)


def test_the_output_contains_the_name_of_the_file(write: Write) -> None:
    assert load_recipe(write(GOOD)).output == "runs/mine"


def test_numbers_are_read_as_yaml_1_2_and_integers_are_valid_floats(write: Write) -> None:
    recipe = load_recipe(write(GOOD + "train: {lr: 2e-4, max_grad_norm: 1, warmup: 0}\n"))
    assert (recipe.train.lr, recipe.train.max_grad_norm, recipe.train.warmup) == (2e-4, 1.0, 0.0)


def test_an_empty_section_is_a_missing_section(write: Write) -> None:
    assert load_recipe(write(GOOD + "train:\n")).train == load_recipe(write(GOOD)).train


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("train.steps=5", "train", "steps", 5),
        ("train.max_grad_norm=null", "train", "max_grad_norm", None),
        ("data.packing=false", "data", "packing", False),
        ("adapter.targets=[q, k]", "adapter", "targets", ["q", "k"]),
        ("adapter.targets=q,k", "adapter", "targets", ["q", "k"]),
        ("adapter.targets=q", "adapter", "targets", ["q"]),
        ("adapter.targets=all", "adapter", "targets", "all"),
        ("adapter.ranks={q: 4, v: 2}", "adapter", "ranks", {"q": 4, "v": 2}),
        ("adapter.ranks={}", "adapter", "ranks", {}),
        ("model.revision=1234567", "model", "revision", "1234567"),
        ("model.name=C:\\models\\x", "model", "name", "C:\\models\\x"),
        ("data.train=a: b.jsonl", "data", "train", "a: b.jsonl"),
    ],
)
def test_an_override_sets_one_setting(
    write: Write, override: str, section: str, name: str, value: Any
) -> None:
    recipe = load_recipe(write(GOOD), [override])
    assert getattr(getattr(recipe, section), name) == value


def test_the_last_override_wins_over_earlier_ones_and_the_file(write: Write) -> None:
    path = write(GOOD + "train: {lr: 1}\n")
    assert load_recipe(path, ["train.lr=2", "train.lr=3"]).train.lr == 3.0


def test_an_empty_override_resets_a_setting(write: Write) -> None:
    path = write(GOOD + "train: {lr: 3}\n")
    assert load_recipe(path, ["train.lr="]).train.lr == 2e-4


def test_all_problems_are_reported_at_once_with_their_places(write: Write) -> None:
    path = write(
        "model: {nme: x}\n"
        "base: {bits: 8, quant_type: nf4}\n"
        "adapter: {rank: 0, targets: [q, 3]}\n"
        "train:\n"
        "  lrr: 1\n"
        "  seed: 1\n"
        "  seed: 2\n"
        "  epochs: 1\n"
        "  steps: 1\n"
        "trian: {}\n"
        "output: runs/{foo}\n"
    )
    found = {problem.where: problem for problem in problems(path, "train.lr=fast", "nonsense")}
    assert set(found) == {
        f"{path}:1: model.name",
        f"{path}:1: model.nme",
        f"{path}:2: base.quant_type",
        f"{path}:3: adapter.rank",
        f"{path}:3: adapter.targets",
        f"{path}:5: train.lrr",
        f"{path}:7: train.seed",
        f"{path}:10: trian",
        f"{path}: data.train",
        "override train.lr=fast",
        "override nonsense",
    }


def test_a_relation_is_checked_in_a_section_with_other_problems(write: Write) -> None:
    path = write(
        "model: {}\ndata: {train: x, bogus: 1}\ntrain: {epochs: 1, steps: 1, lrr: 1}\n"
        "adapter: {method: full}\n"
    )
    text = " ".join(problem.what for problem in problems(path))
    assert "steps and epochs" in text


def test_a_relation_between_sections_is_checked_despite_an_unknown_key(write: Write) -> None:
    found = problems(write(GOOD + "adapter: {method: full}\nx: 1\n"))
    assert any("base.bits=16" in problem.what for problem in found)


@pytest.mark.parametrize("task", ["causal", "preference"])
def test_a_head_that_is_no_classifier_is_refused(write: Write, task: str) -> None:
    (problem,) = problems(write(GOOD), "adapter.method=head", f"task={task}")
    assert f"needs task: classification, and task is {task}" in problem.what


@pytest.mark.parametrize(
    ("init", "overrides", "message"),
    [
        ("pissa", ("adapter.method=dora",), "init: pissa needs method: lora, and method is dora"),
        ("pissa", ("adapter.from=runs/a",), "init: pissa sets the first values of A and B"),
        ("pissa", ("task=preference",), "does not support task: preference"),
        ("pissa", ("base.cache=true",), "of which no packed copy is kept; omit base.cache: true"),
        ("pissa", ("base.residency=disk",), "omit base.residency: disk"),
        ("loftq", ("base.residency=shard",), "does not support base.residency: shard"),
        ("loftq", ("base.bits=16",), "a base of 16 bit has none"),
    ],
)
def test_an_initial_adapter_that_is_impossible_is_refused(
    write: Write, init: str, overrides: tuple[str, ...], message: str
) -> None:
    (problem,) = problems(write(GOOD), f"adapter.init={init}", *overrides)
    assert message in problem.what


def test_a_relation_is_not_checked_with_a_default_in_place_of_a_wrong_value(write: Write) -> None:
    path = write(GOOD + "base: {bits: sixteen}\nadapter: {method: full}\n")
    assert only_problem(path).where == f"{path}:3: base.bits"


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ("train: {lr: fast}", "is 'fast'; it must be a number > 0", None),
        ("train: {lr: .inf}", "is '.inf'; it must be a number > 0", None),
        ("train: {warmup: 1}", "is 1; it must be a number >= 0 and < 1", None),
        ("train: {seed: 1.5}", "is 1.5; it must be an integer >= 0 and <= 4294967295", None),
        ("train: {seed: true}", "is true; it must be an integer >= 0 and <= 4294967295", None),
        ("train: {steps: 0}", "is 0; it must be an integer >= 1 and <= 1000000000 or null", None),
        (
            "data: {train: 3}",
            "is 3; it must be a string or a list of strings or {path, weight}",
            None,
        ),
        ("data: {train: x, packing: yes}", "is 'yes'; it must be true or false", None),
        ("train: 5", "is 5; it must be a section of settings", None),
        (
            "base: {compute_dtype: bf16}",
            "is 'bf16'; it must be auto, float32, float16 or bfloat16",
            "did you mean bfloat16?",
        ),
        ("adapter: {targets: q}", "is 'q'; it must be all or a list of strings", None),
        (
            "base: {overrides: {q: 5}}",
            "has an item that is not accepted; it must be a mapping of strings to 4, 8 or 16 each",
            None,
        ),
        ("adapter: {targets: {q: 1}}", "is a section; it must be all or a list of strings", None),
        (
            "task: casual",
            "is 'casual'; it must be causal, classification or preference",
            "did you mean causal?",
        ),
    ],
)
def test_a_wrong_value_is_reported_with_the_accepted_values(
    write: Write, line: str, what: str, hint: str | None
) -> None:
    key = line.partition(":")[0]
    rest = "" if key == "data" else "data: {train: rows.jsonl}\n"
    problem = only_problem(write(f"model: {{name: starter}}\n{rest}{line}\n"))
    assert (problem.what, problem.hint) == (what, hint)
    assert "Input should" not in str(problem)
    assert "http" not in str(problem)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.lrr=1", "did you mean train.lr?"),
        ("lr=1", "did you mean train.lr?"),
        ("tran.lr=1", "did you mean train.lr?"),
        ("adapter.r=1", "did you mean adapter.rank?"),
        ("adapter.frobnicate=1", "settings of adapter: method, rank"),
        (
            "zzz=1",
            "top-level settings: model, base, adapter, data, train, preference, classification, "
            "task, output",
        ),
        ("train.lr.x=1", "did you mean train.lr?"),
    ],
)
def test_an_unknown_setting_is_reported_with_the_most_similar_one(
    write: Write, override: str, hint: str
) -> None:
    problem = only_problem(write(GOOD), override)
    assert problem.where == f"override {override}"
    assert (problem.hint or "").startswith(hint)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.lr", "is not an override; write it as key=value"),
        ("train=5", "train is a section; set one of train.epochs=..."),
        ("data.seq_len=[1", "the value is not valid YAML"),
    ],
)
def test_an_invalid_override_is_refused(write: Write, override: str, what: str) -> None:
    assert only_problem(write(GOOD), override).what.startswith(what)


@pytest.mark.parametrize(
    ("text", "line", "key", "hint"),
    [
        (GOOD + "train.lr: 1e-3\n", 3, "train.lr", "write `train: {lr: ...}` instead"),
        (
            "data: {train: rows.jsonl}\nmodel.name: starter\n",
            2,
            "model.name",
            "write `model: {name: ...}` instead",
        ),
    ],
)
@pytest.mark.timeout(20)
def test_a_dotted_key_in_a_file_is_one_problem(
    write: Write, text: str, line: int, key: str, hint: str
) -> None:
    path = write(text)
    problem = only_problem(path)
    assert problem.where == f"{path}:{line}: {key}"
    assert problem.what == "a dotted key is not allowed in a recipe file"
    assert problem.hint == hint


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("my.key: 1", "my.key"),
        ("train.lrr: 1", "train.lrr"),
        ("train..lr: 1", "train..lr"),
        ("'.': 1", "."),
        ("'': 1", None),
        ("a.b.c: {d.e: 1}", "a.b.c"),
        ("train: {lr.x: 1}", "train.lr.x"),
        ("train: {train.lr: 1}", "train.train.lr"),
    ],
)
@pytest.mark.timeout(20)
def test_an_unknown_key_with_dots_is_an_unknown_setting(
    write: Write, line: str, key: str | None
) -> None:
    path = write(GOOD + line + "\n")
    problem = only_problem(path)
    assert problem.where == f"{path}:3" + (f": {key}" if key else "")
    assert problem.what == "unknown setting"


@pytest.mark.timeout(20)
def test_a_dotted_key_hides_no_other_problem(write: Write) -> None:
    path = write(GOOD + "train.lr: 1\ntrain: {seed: x, lrr: 1}\n")
    found = problems(path, "train.lr=2")
    assert {problem.where for problem in found} == {
        f"{path}:3: train.lr",
        f"{path}:4: train.seed",
        f"{path}:4: train.lrr",
    }


@pytest.mark.timeout(20)
def test_the_search_for_errors_ends_if_an_error_cannot_be_removed(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "_remove_error", lambda *_: set())
    assert only_problem(write(GOOD + "x: 1\n")).what == "unknown setting"


def test_an_unknown_placeholder_is_refused(write: Write) -> None:
    assert "{nme} is an unknown placeholder" in only_problem(write(GOOD), "output=runs/{nme}").what


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "3\n"])
def test_a_file_without_settings_is_refused(write: Write, text: str) -> None:
    assert "no settings" in only_problem(write(text)).what


def test_an_empty_file_lacks_the_required_settings(write: Write) -> None:
    assert [p.what for p in problems(write(""))] == ["is missing", "is missing"]


def test_invalid_yaml_is_reported_with_its_line(write: Write) -> None:
    path = write("model: {name: x\ndata: [\n")
    assert only_problem(path).where.startswith(f"{path}:")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_recipe(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(tmp_path)


def test_a_missing_file_is_reported_with_a_similar_one(write: Write) -> None:
    path = write(GOOD)
    with pytest.raises(UsageError) as caught:
        load_recipe(path.with_name("mien.yaml"))
    assert str(path) in (caught.value.hint or "")


def test_a_missing_file_is_reported_with_the_shipped_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "qqqqqqqq")
    assert all(name in (caught.value.hint or "") for name in shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_by_its_name(name: str) -> None:
    assert load_recipe(name).output == f"runs/{name}"
