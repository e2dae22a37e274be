"""README.md says what the program says, and the check notices when it does not."""

from __future__ import annotations

from pathlib import Path

import check_docs
import make_docs
import pytest

MARKERS = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in make_docs.SECTIONS)


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    """A page that is right, beside a checkout of one file."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "test").touch()
    path = tmp_path / "README.md"
    path.write_text(make_docs.fill(MARKERS))
    return path


def test_the_readme_is_right(root: Path) -> None:
    assert check_docs.check(root / "README.md") == []


def test_filling_twice_changes_nothing() -> None:
    once = make_docs.fill(f"before\n{MARKERS}after\n")
    assert make_docs.fill(once) == once
    assert once.startswith("before\n")
    assert once.endswith("after\n")


def test_every_command_and_setting_is_in_the_sections() -> None:
    text = make_docs.fill(MARKERS)
    assert "$ qlora recipe schema --help" in text
    assert "| `train.lr` | a number above 0 | `0.0002` |" in text


@pytest.mark.parametrize("missing", MARKERS.split("\n")[:-1])
def test_a_missing_marker_is_told(readme: Path, missing: str) -> None:
    readme.write_text(MARKERS.replace(missing, ""))
    assert any("must stand once" in fault for fault in check_docs.check(readme))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[x](nowhere.md)", "nowhere.md leads nowhere"),
        ("`tools/nothing`", "tools/nothing does not exist"),
        ("```bash\ntools/nothing\n```", "tools/nothing does not exist"),
        ("```bash\n$ qlora trian x\n```", "there is no command trian"),
        ("```bash\nqlora plan x --vrma 24GiB\n```", "plan has no option --vrma"),
        ("```bash\nqlora plan x \\\n  --vrma 24GiB\n```", "plan has no option --vrma"),
        ("```bash\nqlora train x train.lrr=1\n```", "there is no setting train.lrr"),
        ("```bash\nqlora train recipes/nothing.yaml\n```", "no shipped recipe"),
        ("`qlora recipe list|shwo`", "there is no command shwo"),
    ],
)
def test_a_fault_is_found(readme: Path, text: str, told: str) -> None:
    readme.write_text(f"{readme.read_text()}\n{text}\n")
    assert any(told in fault for fault in check_docs.check(readme))


@pytest.mark.parametrize(
    "text",
    [
        "[x](tools/test) [y](https://example.org) [z](#limits)",
        "`tools/test` and `meta-llama/Llama-3.1-8B` and `runs/mine/adapter`",
        "```bash\nqlora train mine.yaml train.lr=1e-4 --resume  # it's fine\n```",
        '```json\n{"train.lrr": 1}\n```',
        "```bash\nqlora generate runs/a --adapter other=runs/b --prompt x\n```",
    ],
)
def test_what_is_right_is_left_alone(readme: Path, text: str) -> None:
    readme.write_text(f"{readme.read_text()}\n{text}\n")
    assert check_docs.check(readme) == []


def test_a_stale_section_is_told(readme: Path) -> None:
    readme.write_text(readme.read_text().replace("Run a recipe's fine-tuning job", "Do it"))
    assert any("stale" in fault for fault in check_docs.check(readme))


def test_a_missing_page_is_told(tmp_path: Path) -> None:
    assert check_docs.check(tmp_path / "README.md") == [f"{tmp_path / 'README.md'} is missing"]
