"""A resumed run equals an uninterrupted one bit for bit; what cannot be resumed is refused."""

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
from qlora_cli.files.checksums import CHECKSUMS
from qlora_cli.files.locate import read_config
from qlora_cli.jobs import train
from qlora_cli.recipe.schema import Model, Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.resume import load_checkpoint, save_checkpoint
from qlora_cli.runs.run import Run
from qlora_cli.train.adamw import AdamW
from qlora_cli.train.loss_scale import LossScale
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import CASES, STEPS, assert_same_run, losses, make_bases, recipe_of
from tests.helpers.runs import make_rows

pytestmark = pytest.mark.slow

SIGINT_HANDLER = signal.getsignal(signal.SIGINT)
"""The handler before any test; a process in the background may ignore the signal."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough that adamw8bit really holds 8-bit states: A of the widest has 4096 values.
    return make_bases(tmp_path_factory.mktemp("bases"), "llama", "gpt2")


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, bases: Path, case: str) -> None:
    settings = CASES[case]
    uninterrupted = train_run(recipe_of(bases, tmp_path / "uninterrupted", **settings))
    stopped_recipe = recipe_of(bases, tmp_path / "stopped_recipe", **settings)
    with pytest.raises(Interrupted):
        train_run(stopped_recipe, stop_after=2)
    torch.manual_seed(999)
    resumed = train_run(stopped_recipe, resume=True)
    if case == "full":
        names = [file.name for file in sorted(uninterrupted.weights.iterdir())]
        assert names
        for name in names:
            assert (uninterrupted.weights / name).read_bytes() == (
                resumed.weights / name
            ).read_bytes()
        assert losses(uninterrupted) == losses(resumed)
    else:
        assert_same_run(uninterrupted, resumed)
    if case == "adamw8bit":
        state = torch.load(resumed.checkpoint(STEPS) / "state.pt", weights_only=True)
        leaves = torch.utils._pytree.tree_leaves(state["optimizer"]["state"])
        dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
        assert torch.uint8 in dtypes, "this case is about 8-bit states"


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path: Path, bases: Path) -> None:
    """Steps after the last checkpoint are repeated; their metrics are not stored twice."""
    uninterrupted = train_run(
        recipe_of(bases, tmp_path / "uninterrupted", train={"checkpoint_every": 2})
    )
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
    assert_same_run(uninterrupted, run)
    assert run.steps() == [2, 4, 5]


def test_other_dropout_masks_would_be_noticed(
    tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = train_run(recipe_of(bases, tmp_path / "uninterrupted"))
    stopped_recipe = recipe_of(bases, tmp_path / "stopped_recipe")
    with pytest.raises(Interrupted):
        train_run(stopped_recipe, stop_after=2)
    # The masks depend on the seed, the step and the micro-batch, and not on a stored state.
    monkeypatch.setattr("qlora_cli.train.step._seed_dropout", lambda state, index: None)
    monkeypatch.setattr("qlora_cli.runs.resume._restore_random_states", lambda states: None)
    assert losses(uninterrupted) != losses(train_run(stopped_recipe, resume=True))


def test_a_missing_optimizer_state_would_be_noticed(
    tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = train_run(recipe_of(bases, tmp_path / "uninterrupted"))
    stopped_recipe = recipe_of(bases, tmp_path / "stopped_recipe")
    with pytest.raises(Interrupted):
        train_run(stopped_recipe, stop_after=2)
    monkeypatch.setattr(AdamW, "load_state_dict", lambda *_: None)
    assert losses(uninterrupted) != losses(train_run(stopped_recipe, resume=True))


@pytest.fixture
def stopped(tmp_path: Path, bases: Path) -> tuple[Recipe, RunFolder]:
    """Return a run that was stopped after step 2 of 5, with checkpoints after steps 1 and 2."""
    recipe = recipe_of(bases, tmp_path / "run", train={"checkpoint_every": 1})
    with pytest.raises(Interrupted) as caught:
        train_run(recipe, stop_after=2)
    assert caught.value.exit_code == 130
    return recipe, RunFolder(tmp_path / "run")


def test_ctrl_c_writes_a_checkpoint_and_the_status(stopped: tuple[Recipe, RunFolder]) -> None:
    recipe, run = stopped
    assert run.read()["status"] == "interrupted"
    assert run.steps() == [1, 2]
    assert signal.getsignal(signal.SIGINT) is SIGINT_HANDLER
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
    """By resuming, and by every command that needs the base."""
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
    for action in (lambda: Run(run.path).base_folder, lambda: train_run(recipe, resume=True)):
        with pytest.raises(ModelError, match="are not those that the run was trained on"):
            action()


def test_a_run_finds_its_rows_from_any_folder(
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
    rows = eval_rows(Run(run.path).recipe, base, read_config(base / "config.json"))
    assert rows.is_task_data
    assert not rows.notes


def test_a_run_of_an_older_version_can_be_resumed(
    tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run.json has the data paths as the recipe had them, and no fingerprint of the base."""
    make_rows(tmp_path / "rows.jsonl", num=17)
    monkeypatch.chdir(tmp_path)
    data = {"train": "rows.jsonl", "eval": None}
    recipe = recipe_of(bases, Path("run"), data=data, train={"checkpoint_every": 1})
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    run = RunFolder(Path("run"))
    content = run.read()
    assert content["recipe"]["data"]["train"] == str(tmp_path / "rows.jsonl")
    del content["base_fingerprint"]
    content["recipe"]["data"]["train"] = "rows.jsonl"
    run.write(content)
    train_run(recipe, resume=True)
    assert run.read()["status"] == "done"


def test_an_empty_run_json_is_refused(tmp_path: Path, bases: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        train_run(recipe_of(bases, tmp_path / "run"), resume=True)


def test_resuming_a_missing_run_is_refused(tmp_path: Path, bases: Path) -> None:
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


def test_a_damaged_checkpoint_without_checksums_is_refused(
    stopped: tuple[Recipe, RunFolder],
) -> None:
    """As older versions wrote them."""
    recipe, run = stopped
    newest = run.checkpoint(2)
    (newest / CHECKSUMS).unlink()
    truncate(newest / "state.pt")
    with pytest.raises(
        ModelError, match="remove its folder; --resume then uses the checkpoint before it"
    ):
        train_run(recipe, resume=True)
    assert run.steps() == [1, 2], "nothing that was written is lost"
    shutil.rmtree(newest)
    train_run(recipe, resume=True)
    assert [line[0] for line in losses(run)] == list(range(1, STEPS + 1))


def test_an_unfinished_checkpoint_is_ignored(stopped: tuple[Recipe, RunFolder]) -> None:
    """A process killed while writing step 3 leaves an unfinished folder, which is never read."""
    recipe, run = stopped
    partial = make_partial_folder(run.checkpoint(3))
    shutil.copytree(run.checkpoint(2), partial, dirs_exist_ok=True)
    truncate(partial / "state.pt")
    assert run.steps() == [1, 2]
    train_run(recipe, resume=True)
    assert run.steps() == [1, 2, 3, 4, 5]
    assert not partial.exists()


def test_a_full_disk_keeps_the_older_checkpoint(
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
    """Without the check, a tensor of one value would be broadcast over a parameter."""
    run = RunFolder(tmp_path)
    stored = {name: torch.nn.Parameter(tensor) for name, tensor in other.items()}
    optimizer = torch.optim.SGD(stored.values(), lr=0.1)
    save_checkpoint(run, 1, stored, optimizer, {"value": 1.0, "good_steps": 0.0})
    mine = {"a": torch.nn.Parameter(torch.zeros(3))}
    with pytest.raises(QloraError, match="not those that the recipe trains"):
        load_checkpoint(run.checkpoint(1), mine, optimizer)
    assert not mine["a"].any()
