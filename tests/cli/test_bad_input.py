"""Bad input through the command line: one clear error, the right exit code, nothing lost.

The base is a tiny one made on the spot, so that a job that gets as far as its plan takes a second.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.files.source import INDEX, SINGLE
from qlora_cli.memory.device import inspect_device
from tests.helpers.cli_helpers import Outcome, qlora
from tests.helpers.runs import make_base, make_rows

RECIPE = """\
model: {{name: {base}}}
adapter: {{rank: 2}}
data: {{train: {rows}, seq_len: 32}}
train: {{steps: 3, grad_accum: 1, checkpoint_every: 1}}
output: {folder}/run
"""
FILES = ("adapter/adapter_model.safetensors", "checkpoints/step-000001/trained.safetensors")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of one file."""
    return make_base(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of several files."""
    return make_base(tmp_path_factory.mktemp("sharded"), "llama", shard="100KB")


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Path:
    """A recipe of three steps; its run's folder is `run` beside it."""
    rows = make_rows(tmp_path / "rows.jsonl")
    path = tmp_path / "job.yaml"
    path.write_text(RECIPE.format(base=tiny, rows=rows, folder=tmp_path))
    return path


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a finished run, which no test may change."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "job.yaml"
    path.write_text(RECIPE.format(base=tiny, rows=make_rows(folder / "rows.jsonl"), folder=folder))
    outcome = qlora("train", path)
    assert outcome.code == 0, outcome.err
    return path


def refused(outcome: Outcome, code: int, *words: str | Path) -> None:
    """One error, in the project's own words, with that exit code and every one of `words`."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.count("error: ") == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert "unexpected" not in outcome.err, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def free_again(job: Path) -> None:
    """The refused run left nothing, and the corrected one goes through in the same folder."""
    run = job.parent / "run"
    assert not content(run)
    outcome = qlora("train", job, "train.steps=1")
    assert outcome.code == 0, outcome.err


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# The recipe


def test_all_problems_of_a_recipe_come_at_once(job: Path) -> None:
    job.write_text(
        "model: {nam: x}\n"
        "base: {bits: 5}\n"
        "adapter: {rank: many, targets: []}\n"
        "data: {train: 3}\n"
        "train:\n"
        "  lr: fast\n"
        "  lr: slow\n"
        "trian: {}\n"
    )
    outcome = qlora("train", job, "train.seed=x", "data.seqlen=3")
    refused(
        outcome,
        2,
        f"{job}:1: model.nam: unknown setting",
        f"{job}:1: model.name: is missing",
        f"{job}:2: base.bits: is 5; it must be 4, 8 or 16",
        f"{job}:3: adapter.rank: is 'many'; it must be an integer",
        f"{job}:4: data.train: is 3; it must be a string",
        f"{job}:7: train.lr: is written twice",
        f"{job}:8: trian: unknown setting",
        "did you mean train?",
        "override train.seed=x: is 'x'; it must be an integer",
        "override data.seqlen=3: unknown setting data.seqlen",
        "did you mean data.seq_len?",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {name: x", (":1", "cannot be read")),
        ("- a\n- b\n", ("is not a recipe",)),
        ("", ("model.name", "data.train", "is missing")),
        ("task: classification\nmodel: {name: x}\ndata: {train: y}\n", ("not supported",)),
    ],
)
def test_text_that_is_no_recipe(job: Path, text: str, words: tuple[str, ...]) -> None:
    job.write_text(text)
    refused(qlora("train", job), 2, job, *words)


def test_a_recipe_that_is_not_there(job: Path) -> None:
    refused(qlora("train", job.with_name("jb.yaml")), 2, "no such recipe", f"did you mean {job}")
    refused(qlora("train", job.parent), 2, "is a folder")


# The data


@pytest.mark.parametrize("setting", ["data.train", "data.eval"])
def test_a_file_that_is_not_there_names_its_neighbours(job: Path, setting: str) -> None:
    missing = job.with_name("row.jsonl")
    outcome = qlora("train", job, f"{setting}={missing}")
    refused(outcome, 2, f"no file {missing}", job.with_name("rows.jsonl"))
    free_again(job)


def write_rows(file: Path, *rows: object) -> Path:
    file.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return file


GOOD = {"text": "abcdef"}
ASKED = {"messages": [{"role": "user", "content": "Hello?"}]}
MASKED = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ("bad.jsonl", "no rows")),
        (["", " "], ("bad.jsonl", "no rows")),
        ([GOOD, {"txt": "x"}], ("1 of 2 rows", "bad.jsonl:2", "'txt'", "rename 'txt' to 'text'")),
        ([GOOD, {"text": 3}, {"text": None}], ("2 of 3", "bad.jsonl:2", "bad.jsonl:3", "is null")),
        (["[1]", GOOD, "{"], ("2 of 3", "bad.jsonl:1", "a list", "bad.jsonl:3", "broken JSON")),
        ([{"a": 1}], ("no known format", "bad.jsonl:1", "rename the fields")),
        (
            [GOOD, {"text": "x" * 40}],
            ("bad.jsonl:2", "41 tokens, and seq_len is 32", "data.seq_len=41"),
        ),
        ([MASKED, MASKED], ("2 of 2", "bad.jsonl:1", "bad.jsonl:2", "no token")),
        ([ASKED], ("bad.jsonl:1", "no assistant's message to train on")),
        ([{"input_ids": [5, 999]}], ("bad.jsonl:1", "999", "the vocabulary ends at")),
        ([{"input_ids": [5, 6], "labels": [5]}], ("bad.jsonl:1", "1 labels for 2 input_ids")),
    ],
)
def test_rows_that_cannot_be_trained_on(job: Path, rows: list[Any], words: tuple[str, ...]) -> None:
    bad = write_rows(job.with_name("bad.jsonl"), *rows)
    for command in ("train", "data"):
        refused(qlora(command, job, f"data.train={bad}"), 2, *words)
    assert not (job.parent / "run").exists()


def test_rows_longer_than_the_base_has_positions(job: Path) -> None:
    rows = write_rows(job.with_name("long.jsonl"), GOOD, {"text": "x" * 80})
    outcome = qlora("train", job, f"data.train={rows}", "data.seq_len=128")
    refused(outcome, 2, "long.jsonl:2", "64 positions")
    free_again(job)


# The base


def test_a_base_that_is_not_there(job: Path, tiny: Path) -> None:
    missing = tiny.with_name(f"{tiny.name}x")
    refused(qlora("train", job, f"model.name={missing}"), 2, f"no folder {missing}", tiny)
    refused(qlora("train", job, "model.name=nobody/nothing"), 2, "model.name", "nobody/nothing")
    refused(qlora("train", job, f"model.name={job.parent}"), 2, "no config.json")
    free_again(job)


def test_an_unknown_family_lists_its_linears(job: Path, tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    sizes = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "opt", "vocab_size": 300, "word_embed_proj_dim": 8, **sizes}
    (other / "config.json").write_text(json.dumps(config))
    for command in ("train", "plan"):
        outcome = qlora(command, job, f"model.name={other}")
        refused(
            outcome,
            2,
            "'opt' is not known",
            "llama",
            "self_attn.q_proj",
            "qlora_cli/models/families/",
        )
    free_again(job)


def test_a_config_that_is_none(job: Path, tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    for text in ("{", "[]", "{}", '{"model_type": "no-such-model"}'):
        (other / "config.json").write_text(text)
        refused(qlora("train", job, f"model.name={other}"), 2, other / "config.json")
    free_again(job)


def test_unknown_targets_come_with_the_roles_that_there_are(job: Path) -> None:
    outcome = qlora("train", job, "adapter.targets=[q, query, model.layers.0.attn]")
    words = ("'query'", "'model.layers.0.attn'", "roles of this model: q, k, v, o, gate, up, down")
    refused(outcome, 2, "adapter.targets", *words)
    free_again(job)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _garbage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"\xff" * 40 + content[48:])


def _no_header(file: Path) -> None:
    file.write_bytes(b"\x01")


def _endless_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


@pytest.mark.parametrize("damage", [_truncate, _garbage, _no_header, _endless_header])
def test_a_damaged_safetensors_file(
    job: Path, tiny: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    damage(other / SINGLE)
    for command in (("train", job, f"model.name={other}"), ("generate", other, "--prompt", "x")):
        refused(qlora(*command), 2, other / SINGLE, "damaged safetensors file", "fetch the file")
    free_again(job)


def test_a_missing_shard_and_a_damaged_index(job: Path, sharded: Path, tmp_path: Path) -> None:
    other = shutil.copytree(sharded, tmp_path / "other")
    shard = sorted(other.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(qlora("train", job, f"model.name={other}"), 2, other, f"missing {shard.name}")
    (other / INDEX).write_text("{}")
    refused(qlora("train", job, f"model.name={other}"), 2, other / INDEX, "damaged index")
    free_again(job)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"hidden_size": -64},
        {"num_hidden_layers": 0},
        {"num_key_value_heads": 3},
        {"dtype": "float8_e4m3fn"},
    ],
    ids=str,
)
def test_a_config_that_describes_no_model(
    job: Path, tiny: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    file = other / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for command in ("plan", "train"):
        refused(qlora(command, job, f"model.name={other}"), 2, file, "describes no model")


def test_a_size_without_a_unit_is_no_card(job: Path) -> None:
    outcome = qlora("plan", job, "--vram", "24")
    assert outcome.code == 2
    assert "write it with its unit, 24GiB" in outcome.err


def test_tensors_that_are_not_those_of_the_config(job: Path, tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 3}, ("missing: model.layers.2",)),
        ({"intermediate_size": 64}, ("(96, 64) in the checkpoint and (64, 64) by its config",)),
    ):
        (other / "config.json").write_text(json.dumps(config | change))
        refused(qlora("train", job, f"model.name={other}"), 2, "model.name", *words)
    free_again(job)


# Used folders


def test_a_used_folder_is_refused_and_left_as_it_is(trained: Path) -> None:
    run = trained.parent / "run"
    before = content(run)
    refused(qlora("train", trained), 2, f"{run} is in use", "--resume", "output=...")
    outcome = qlora("train", trained, "--resume", "train.lr=0.1")
    refused(outcome, 2, run / "run.json", "train.lr was 0.0002, is 0.1")
    assert content(run) == before


def test_a_folder_with_other_things_is_not_touched(job: Path) -> None:
    run = job.parent / "run"
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    refused(qlora("train", job), 2, f"{run} is in use")
    assert content(run) == {"mine.txt": b"mine"}
    refused(qlora("train", job, "--resume"), 2, f"{run} is no run's folder")


def test_output_that_cannot_be_a_folder(job: Path) -> None:
    refused(qlora("train", job, f"output={job}"), 2, f"{job} is in use")
    refused(qlora("train", job, f"output={job}/below"), 1, f"{job}/below", "Not a directory")


def test_going_on_with_a_finished_run_changes_nothing(trained: Path) -> None:
    run = trained.parent / "run"
    told = json.loads((run / "run.json").read_text())["result"]
    memory = (run / "memory.json").read_bytes()
    outcome = qlora("train", trained, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["train_loss"] == told["train_loss"]
    assert (run / "memory.json").read_bytes() == memory


def test_merge_and_verify_name_what_is_not_there(trained: Path, tiny: Path, tmp_path: Path) -> None:
    run = trained.parent / "run"
    refused(qlora("merge", run, "--out", tiny), 2, f"{tiny} is in use")
    refused(qlora("merge", tmp_path, "--out", tmp_path / "m"), 2, f"{tmp_path} is no run's folder")
    refused(qlora("verify", tmp_path / "no", "--against", run), 2, tmp_path / "no")
    refused(qlora("verify", tiny, "--against", tmp_path), 2, f"{tmp_path} is no run's folder")
    refused(qlora("report", tmp_path), 2, f"{tmp_path} is no run's folder")
    refused(qlora("eval", run, "--data", tmp_path / "no.jsonl"), 2, tmp_path / "no.jsonl")
    refused(qlora("generate", tmp_path / "no", "--prompt", "x"), 2, tmp_path / "no")
    for arguments in (("train",), ("eval", run), ("merge", run), ("train", trained, "--resum")):
        assert qlora(*arguments).code == 2


# A full disk


@contextmanager
def full_disk(part: str) -> Iterator[None]:
    """Files whose path matches the pattern `part` are written to a device that is full."""
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    real_open = Path.open

    def open_(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        full = re.search(part, str(path)) and mode[0] in "wxa"
        return real_open(device if full else path, mode, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_)
        yield


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (r"step-000002\.\w+\.partial/trained", ("the checkpoint", "step-000002")),
        (r"step-000002\.\w+\.partial/state", ("the checkpoint", "step-000002")),
        ("adapter_model", ("the adapter", "run/adapter")),
        ("adapter_config", ("the adapter", "run/adapter")),
        ("memory", ("memory", "run/memory.json")),
    ],
)
def test_a_full_disk_loses_nothing_that_was_written(
    job: Path, trained: Path, part: str, words: tuple[str, ...]
) -> None:
    run = job.parent / "run"
    with full_disk(part):
        refused(qlora("train", job), 1, "could not be written", "--resume", *words)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert (run / "checkpoints" / "step-000001" / "state.pt").is_file()
    assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".tmp")]
    outcome = qlora("train", job, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    for file in FILES:
        assert (run / file).read_bytes() == (trained.parent / "run" / file).read_bytes()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(("part", "file"), [("metrics", "metrics.jsonl"), ("run.json", "run.json")])
def test_a_disk_that_is_full_from_the_beginning(job: Path, part: str, file: str) -> None:
    with full_disk(part):
        refused(qlora("train", job), 1, f"run/{file}", "could not be written", "No space left")
    free_again(job)


def test_a_disk_so_full_that_the_status_cannot_be_written_either(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.train import loop

    real = loop.save_checkpoint
    with ExitStack() as stack, monkeypatch.context() as patch:

        def full_now(*arguments: Any) -> Any:
            stack.enter_context(full_disk("/run/"))
            return real(*arguments)

        patch.setattr(loop, "save_checkpoint", full_now)
        refused(qlora("train", job), 1, "the checkpoint could not be written", "No space left")
    assert json.loads((job.parent / "run" / "run.json").read_text())["status"] == "running"
    outcome = qlora("train", job, "--resume")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("part", [".safetensors", "config.json", "merge.json"])
def test_a_full_disk_while_merging(trained: Path, tmp_path: Path, part: str) -> None:
    run, out = trained.parent / "run", tmp_path / "merged"
    before = content(run)
    with full_disk(part):
        refused(qlora("merge", run, "--out", out), 1, out, "could not be written")
    assert not out.exists()
    assert content(run) == before
    assert qlora("merge", run, "--out", out).code == 0
    assert qlora("verify", out, "--against", run).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


# Damage done to a run, and the other exit codes


def test_a_run_with_damaged_files(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained.parent / "run", tmp_path / "run")
    (run / "memory.json").write_text("{")
    refused(qlora("report", run), 2, run / "memory.json", "damaged")
    _truncate(run / "adapter" / "adapter_model.safetensors")
    for command in (("merge", run, "--out", tmp_path / "m"), ("generate", run, "--prompt", "x")):
        refused(qlora(*command), 2, run / "adapter", "damaged")
    assert not (tmp_path / "m").exists()
    (run / "run.json").write_text("{")
    refused(qlora("report", run), 2, run / "run.json", "damaged")


def test_a_damaged_merge_does_not_pass(trained: Path, tmp_path: Path) -> None:
    run, out = trained.parent / "run", tmp_path / "merged"
    assert qlora("merge", run, "--out", out).code == 0
    _truncate(next(out.glob("*.safetensors")))
    outcome = qlora("verify", out, "--against", run)
    assert outcome.code == 4, outcome.err
    assert "Traceback" not in outcome.err


def test_a_job_too_large_exits_3_and_leaves_nothing(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.jobs import train

    small = dataclasses.replace(inspect_device(), capacity_bytes=1000)
    with monkeypatch.context() as patch:
        patch.setattr(train, "inspect_device", lambda: small)
        refused(qlora("train", job), 3, "the job needs", "has 1000 B", "qlora plan")
    free_again(job)


def test_ctrl_c_exits_130_and_keeps_every_step(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_cli.train import loop

    real = loop.train_step

    def interrupted(state: Any, *rest: Any) -> Any:
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(state, *rest)

    run = job.parent / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        outcome = qlora("train", job, "train.checkpoint_every=100")
    assert outcome.code == 130
    assert "stopped after step 2 of 3" in outcome.err
    assert "--resume" in outcome.err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert qlora("train", job, "train.checkpoint_every=100", "--resume").code == 0


def test_ctrl_c_before_the_first_step_leaves_nothing(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.jobs import train

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "build_state", interrupted)
        outcome = qlora("train", job)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    free_again(job)
