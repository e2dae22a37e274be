"""A resumed run is the unbroken one, bit for bit; what cannot be resumed says so."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import InputError, Interrupted, ModelError, QloraError, UsageError
from qlora_cli.events import Silent, StepEvent
from qlora_cli.export.compare.eval_rows import eval_rows
from qlora_cli.files.atomic import make_partial_folder
from qlora_cli.files.locate import read_config
from qlora_cli.jobs import train
from qlora_cli.recipe.schema import Model, Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.resume import load_checkpoint, save_checkpoint
from qlora_cli.runs.run import Run
from qlora_cli.train.adamw import AdamW
from qlora_cli.train.loss_scale import LossScale
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import CASES, STEPS, assert_same_run, losses, recipe_of
from tests.helpers.runs import make_base, make_rows


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl", num=17, length=12)
    for family in ("llama", "gpt2"):
        # Wide enough that adamw8bit really holds 8-bit states: A of the widest has 4096 values.
        make_base(folder / family, family, spread=0.1)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_and_resumed_is_the_unbroken_one(
    tmp_path: Path, bases: Path, case: str
) -> None:
    settings = CASES[case]
    unbroken = train_run(recipe_of(bases, tmp_path / "unbroken", **settings))
    broken = recipe_of(bases, tmp_path / "broken", **settings)
    with pytest.raises(Interrupted):
        train_run(broken, stop_after=2)
    torch.manual_seed(999)
    resumed = train_run(broken, resume=True)
    if case == "full":
        names = [file.name for file in sorted(unbroken.weights.iterdir())]
        assert names
        for name in names:
            assert (unbroken.weights / name).read_bytes() == (resumed.weights / name).read_bytes()
        assert losses(unbroken) == losses(resumed)
    else:
        assert_same_run(unbroken, resumed)
    if case == "adamw8bit":
        state = torch.load(resumed.checkpoint(STEPS) / "state.pt", weights_only=True)
        leaves = torch.utils._pytree.tree_leaves(state["optimizer"]["state"])
        dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
        assert torch.uint8 in dtypes, "this case is about 8-bit states"


def test_a_run_killed_between_checkpoints_goes_on_from_the_last(
    tmp_path: Path, bases: Path
) -> None:
    """Steps done after the last checkpoint are done again; their metrics are not there twice."""
    unbroken = train_run(recipe_of(bases, tmp_path / "unbroken", train={"checkpoint_every": 2}))
    recipe = recipe_of(bases, tmp_path / "killed", train={"checkpoint_every": 2})

    class Killed(Silent):
        def step(self, event: StepEvent) -> None:
            if event.step == 4:
                raise KeyboardInterrupt  # within step 4, before its checkpoint

    with pytest.raises(KeyboardInterrupt):
        train.run(recipe, recipe_path=None, resume=False, observer=Killed())
    run = RunFolder(tmp_path / "killed")
    assert run.steps() == [2]
    assert len(losses(run)) == 4
    train_run(recipe, resume=True)
    assert_same_run(unbroken, run)
    assert run.steps() == [2, 4, 5]


def test_this_test_would_see_a_forgotten_random_state(
    tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train_run(recipe_of(bases, tmp_path / "unbroken"))
    broken = recipe_of(bases, tmp_path / "broken")
    with pytest.raises(Interrupted):
        train_run(broken, stop_after=2)
    monkeypatch.setattr("qlora_cli.runs.resume._restore_random_states", lambda states: None)
    assert losses(unbroken) != losses(train_run(broken, resume=True))


def test_this_test_would_see_a_forgotten_optimizer_state(
    tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train_run(recipe_of(bases, tmp_path / "unbroken"))
    broken = recipe_of(bases, tmp_path / "broken")
    with pytest.raises(Interrupted):
        train_run(broken, stop_after=2)
    monkeypatch.setattr(AdamW, "load_state_dict", lambda *_: None)
    assert losses(unbroken) != losses(train_run(broken, resume=True))


@pytest.fixture
def stopped(tmp_path: Path, bases: Path) -> tuple[Recipe, RunFolder]:
    """Checkpoints after steps 1 and 2 of 5."""
    recipe = recipe_of(bases, tmp_path / "run", train={"checkpoint_every": 1})
    with pytest.raises(Interrupted) as caught:
        train_run(recipe, stop_after=2)
    assert caught.value.exit_code == 130
    return recipe, RunFolder(tmp_path / "run")


def test_ctrl_c_leaves_a_checkpoint_and_says_so(stopped: tuple[Recipe, RunFolder]) -> None:
    recipe, run = stopped
    assert run.read()["status"] == "interrupted"
    assert run.steps() == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train_run(recipe, resume=True)
    assert run.read()["status"] == "done"


def test_a_changed_recipe_is_refused(stopped: tuple[Recipe, RunFolder], bases: Path) -> None:
    recipe, run = stopped
    faster = recipe.train.model_copy(update={"lr": 1e-3, "seed": 9})
    with pytest.raises(UsageError) as caught:
        train_run(recipe.model_copy(update={"train": faster}), resume=True)
    assert "train.lr was 0.01, is 0.001" in str(caught.value)
    assert "train.seed was 0, is 9" in str(caught.value)
    assert caught.value.exit_code == 2
    assert run.steps() == [1, 2]
    assert len(losses(run)) == 2


def test_a_changed_base_is_refused(tmp_path: Path, bases: Path) -> None:
    """By resuming, and by whatever puts the adapter on it."""
    mine = Path(shutil.copytree(bases / "llama", tmp_path / "base"))
    recipe = recipe_of(bases, tmp_path / "run", train={"steps": 2})
    recipe = recipe.model_copy(update={"model": Model(name=str(mine))})
    run = RunFolder(tmp_path / "run")
    train_run(recipe)
    assert Run(run.path).base_folder == mine
    (file,) = mine.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    for asked in (lambda: Run(run.path).base_folder, lambda: train_run(recipe, resume=True)):
        with pytest.raises(ModelError, match="are not those that the run was trained on"):
            asked()


def test_a_run_is_judged_on_its_rows_from_any_folder(
    tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    data = {"train": "rows.jsonl", "eval": "rows.jsonl"}
    train_run(recipe_of(bases, Path("run"), data=data, train={"steps": 1}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = RunFolder(tmp_path / "run")
    base = Run(run.path).base_folder
    judged = eval_rows(Run(run.path).recipe, base, read_config(base / "config.json"))
    assert judged.is_task_data
    assert not judged.notes


def test_a_run_of_an_older_version_goes_on(
    tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run.json tells of its files as they were named, and nothing of the base's weights."""
    make_rows(tmp_path / "rows.jsonl", num=17)
    monkeypatch.chdir(tmp_path)
    data = {"train": "rows.jsonl", "eval": None}
    recipe = recipe_of(bases, Path("run"), data=data, train={"checkpoint_every": 1})
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    run = RunFolder(Path("run"))
    about = run.read()
    assert about["recipe"]["data"]["train"] == str(tmp_path / "rows.jsonl")
    del about["base_fingerprint"]
    about["recipe"]["data"]["train"] = "rows.jsonl"
    run.write(about)
    train_run(recipe, resume=True)
    assert run.read()["status"] == "done"


def test_a_run_that_tells_nothing_is_named(tmp_path: Path, bases: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        train_run(recipe_of(bases, tmp_path / "run"), resume=True)


def test_nothing_to_resume_is_a_clear_error(tmp_path: Path, bases: Path) -> None:
    with pytest.raises(InputError, match="not a run's folder"):
        train_run(recipe_of(bases, tmp_path / "never"), resume=True)


def test_a_second_run_into_a_used_folder_is_refused(stopped: tuple[Recipe, RunFolder]) -> None:
    recipe, run = stopped
    before = run.run_json.read_bytes()
    with pytest.raises(UsageError, match="in use"):
        train_run(recipe)
    assert run.run_json.read_bytes() == before


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, Any] = {
    "state cut short": lambda folder: truncate(folder / "state.pt"),
    "state overwritten": lambda folder: (folder / "state.pt").write_bytes(b"not a state" * 99),
    "state empty": lambda folder: (folder / "state.pt").write_bytes(b""),
    "state missing": lambda folder: (folder / "state.pt").unlink(),
    "tensors cut short": lambda folder: truncate(folder / "trained.safetensors"),
    "tensors missing": lambda folder: (folder / "trained.safetensors").unlink(),
    "state of something else": lambda folder: torch.save({"epoch": 3}, folder / "state.pt"),
}


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = RunFolder(tmp_path_factory.mktemp("good"))
    trained, optimizer = small()
    trained["a"].grad = torch.ones(40)
    optimizer.step()
    return save_checkpoint(run, 1, trained, optimizer, LossScale(needed=False).state())


def small() -> tuple[dict[str, torch.nn.Parameter], AdamW]:
    trained = {"a": torch.nn.Parameter(torch.ones(40))}
    return trained, AdamW(trained.values(), 0.0)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, good_checkpoint: Path, damage: str) -> None:
    folder = shutil.copytree(good_checkpoint, tmp_path / "step-000001")
    assert load_checkpoint(folder, *small())[0] == 1
    DAMAGE[damage](folder)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(folder, *small())
    assert "this checkpoint is damaged" in str(caught.value)
    assert str(folder) in str(caught.value)


def test_the_checkpoint_before_a_damaged_one_is_good(stopped: tuple[Recipe, RunFolder]) -> None:
    recipe, run = stopped
    newest = run.checkpoint(2)
    truncate(newest / "state.pt")
    with pytest.raises(ModelError, match="remove its folder; --resume then uses the checkpoint before it"):
        train_run(recipe, resume=True)
    assert run.steps() == [1, 2], "nothing that was written is lost"
    shutil.rmtree(newest)
    train_run(recipe, resume=True)
    assert [line[0] for line in losses(run)] == list(range(1, STEPS + 1))


def test_a_half_written_checkpoint_is_no_checkpoint(stopped: tuple[Recipe, RunFolder]) -> None:
    """A process killed while writing step 3 leaves a folder beside, which is never read."""
    recipe, run = stopped
    half = make_partial_folder(run.checkpoint(3))
    shutil.copytree(run.checkpoint(2), half, dirs_exist_ok=True)
    truncate(half / "state.pt")
    assert run.steps() == [1, 2]
    train_run(recipe, resume=True)
    assert run.steps() == [1, 2, 3, 4, 5]
    assert not half.exists()


def test_a_full_disk_leaves_the_older_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    trained = {"a": torch.nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    scale = LossScale(needed=False).state()
    save_checkpoint(run, 1, trained, optimizer, scale)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(QloraError, match="No space left"):
        save_checkpoint(run, 2, trained, optimizer, scale)
    monkeypatch.undo()
    assert run.steps() == [1]
    assert [entry.name for entry in run.checkpoints.iterdir()] == ["step-000001"]
    assert load_checkpoint(run.checkpoint(1), trained, optimizer)[0] == 1


@pytest.mark.parametrize(
    "other", [{"b": torch.ones(3)}, {"a": torch.ones(1)}], ids=["other names", "other shape"]
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, other: dict[str, torch.Tensor]
) -> None:
    """A tensor of one value would spread over a whole parameter, and nobody would know."""
    run = RunFolder(tmp_path)
    stored = {name: torch.nn.Parameter(tensor) for name, tensor in other.items()}
    optimizer = torch.optim.SGD(stored.values(), lr=0.1)
    save_checkpoint(run, 1, stored, optimizer, {"value": 1.0, "good_steps": 0.0})
    mine = {"a": torch.nn.Parameter(torch.zeros(3))}
    with pytest.raises(QloraError, match="not those that the recipe trains"):
        load_checkpoint(run.checkpoint(1), mine, optimizer)
    assert not mine["a"].any()
