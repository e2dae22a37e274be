"""Commands remove and overwrite only files that qlora wrote itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import QloraError
from qlora_cli.files.atomic import partial_folders
from qlora_cli.jobs import quickstart
from tests.helpers.cli_checks import file_contents
from tests.helpers.cli_helpers import Outcome, qlora

pytestmark = pytest.mark.slow

# report


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run's folder."""
    return shutil.copytree(run, tmp_path / "copy")


@pytest.mark.parametrize("option", ["--html", "--png"])
@pytest.mark.parametrize("text", ["mine", ""])
def test_a_report_overwrites_no_foreign_file(
    copy: Path, tmp_path: Path, option: str, text: str
) -> None:
    keep = tmp_path / "keep.html"
    keep.write_text(text)
    outcome = qlora("report", copy, option, keep)
    assert outcome.code == 2
    assert str(keep) in outcome.err
    assert "--force" in outcome.err
    assert keep.read_text() == text
    assert qlora("report", copy, option, keep, "--force").code == 0
    assert keep.read_bytes() != text.encode()
    assert qlora("report", copy, option, keep).code == 0, "its own report is replaced"


def test_a_report_removes_no_file_with_a_similar_name(copy: Path, tmp_path: Path) -> None:
    for name in ("keep.tmp", "keep.partial", ".keep.html.partial"):
        (tmp_path / name).write_text("mine")
    assert qlora("report", copy, "--html", tmp_path / "keep.html").code == 0
    for name in ("keep.tmp", "keep.partial", ".keep.html.partial"):
        assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "forced"])
@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_report_overwrites_no_other_file_of_a_run(
    copy: Path, tmp_path: Path, option: str, force: tuple[str, ...]
) -> None:
    (tmp_path / "link").symlink_to(copy / "run.json")
    (copy / "mine.html").symlink_to(tmp_path / "elsewhere")
    names = ("run.json", "metrics.jsonl", "memory.json", "adapter/adapter_config.json")
    inside = [copy / name for name in (*names, "mine.html", "new.html")]
    before = file_contents(copy)
    for path in (*inside, copy / ".." / "copy" / "run.json", tmp_path / "link"):
        outcome = qlora("report", copy, option, path, *force)
        assert outcome.code == 2
        assert str(path) in outcome.err
    assert file_contents(copy) == before
    assert (copy / "mine.html").is_symlink()


def test_a_report_replaces_the_report_in_the_folder_of_the_run(copy: Path) -> None:
    for name in ("report.html", "memory.png"):
        (copy / name).write_text("of an older version")
    pages = ("--html", copy / "report.html", "--png", copy / "memory.png")
    assert qlora("report", copy, *pages).code == 0
    assert b"older" not in (copy / "report.html").read_bytes() + (copy / "memory.png").read_bytes()
    assert qlora("report", copy, *pages, "--force").code == 0


# quickstart


@pytest.fixture
def fake_jobs(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Replace the jobs of the quickstart: they write three small files and raise an error."""

    def replace(error: BaseException) -> None:
        def write_files(out: Path, _: Any) -> None:
            for name in ("run/run.json", "run/adapter/a", "merged/model.safetensors"):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text("written by the quickstart")
            raise error

        monkeypatch.setattr(quickstart, "_run_jobs", write_files)

    replace(QloraError("the jobs are done"))
    return replace


def run_quickstart(out: Path) -> Outcome:
    return qlora("quickstart", "--out", out)


@pytest.mark.parametrize(
    "names",
    [
        ("merged/thesis.txt",),
        ("run/run.json", "run/adapter/adapter_model.safetensors"),
        ("run/run.json", "merged/model.safetensors"),
        ("run", "merged"),
        ("run/notes.txt",),
        ("notes.txt",),
    ],
)
def test_a_quickstart_keeps_foreign_files(
    fake_jobs: object, tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / "q" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "q" / name).write_text("mine")
    before = file_contents(tmp_path / "q")
    outcome = run_quickstart(tmp_path / "q")
    assert outcome.code == 2
    assert "--force" in outcome.err
    assert file_contents(tmp_path / "q") == before


@pytest.mark.parametrize("stop", [False, True])
def test_a_quickstart_replaces_the_files_of_an_earlier_one(
    fake_jobs: Callable[[BaseException], None], tmp_path: Path, stop: bool
) -> None:
    out = tmp_path / "q"
    if stop:
        fake_jobs(KeyboardInterrupt())
    run_quickstart(out)
    (out / "run" / "report.html").write_text("written after the job")
    fake_jobs(QloraError("the jobs are done"))
    outcome = run_quickstart(out)
    assert "the jobs are done" in outcome.err
    assert not (out / "run" / "report.html").exists()
    (out / "merged" / "notes.txt").write_text("mine")
    before = file_contents(out)
    outcome = run_quickstart(out)
    assert (outcome.code, "notes.txt" in outcome.err) == (2, True)
    assert file_contents(out) == before


def test_a_forced_quickstart_replaces_its_two_folders_only(
    fake_jobs: object, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    (out / "run").mkdir(parents=True)
    for name in ("run/run.json", "run/x", "merged", "notes.txt"):
        (out / name).write_text("mine")
    qlora("quickstart", "--out", out, "--force")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "run" / "run.json").read_text() == "written by the quickstart"
    assert not (out / "run" / "x").exists()


# merge


def test_a_merge_keeps_folders_with_similar_names(run: Path, tmp_path: Path) -> None:
    for name in (".nb.partial", ".nb.old", ".nb.0123456789abcdef.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "merge.json").write_text("mine")
    outcome = qlora("merge", run, "--out", tmp_path / "nb")
    assert outcome.code == 0, outcome.err
    assert len(list(tmp_path.iterdir())) == 4
    assert all(path.read_text() == "mine" for path in tmp_path.glob(".nb.*/merge.json"))


def test_a_merge_keeps_a_file_that_appears_in_out_meanwhile(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.export.merge import write

    out, real = tmp_path / "out", write.copy_files

    def copy_files(*arguments: Any) -> None:
        real(*arguments)
        out.mkdir()
        (out / "notes.txt").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(write, "copy_files", copy_files)
        outcome = qlora("merge", run, "--out", out)
    assert outcome.code == 2
    (partial,) = partial_folders(out)
    assert str(partial) in outcome.err
    assert file_contents(out) == {"notes.txt": b"mine"}
    shutil.rmtree(out)
    assert qlora("merge", run, "--out", out).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [name for name in file_contents(out) if "partial" in name]
