"""The documentation agrees with the program, and check_docs.py reports where it does not."""

from __future__ import annotations

import re
from pathlib import Path

import check_docs
import check_layers
import make_docs
import pytest

LAYERS = "\n".join(f"| `{room}/` | x |" for rooms in check_layers.LAYERS for room in rooms)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose pages have no fault."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "test").touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# readme\n")
    (tmp_path / "docs" / "architecture.md").write_text(f"{LAYERS}\n")
    for page, sections in make_docs.PAGES.items():
        (tmp_path / page).write_text(make_docs.fill(markers(sections), sections))
    return tmp_path


def markers(sections: tuple[str, ...]) -> str:
    return "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in sections)


def test_the_documentation_has_no_fault(root: Path) -> None:
    assert check_docs.check(root) == []


def test_every_section_has_a_page() -> None:
    assert sorted(n for names in make_docs.PAGES.values() for n in names) == sorted(
        make_docs.SECTIONS
    )


def test_filling_twice_changes_nothing() -> None:
    sections = tuple(make_docs.SECTIONS)
    once = make_docs.fill(f"before\n{markers(sections)}after\n", sections)
    assert make_docs.fill(once, sections) == once
    assert once.startswith("before\n")
    assert once.endswith("after\n")


def test_every_command_and_setting_is_in_the_sections() -> None:
    sections = tuple(make_docs.SECTIONS)
    text = make_docs.fill(markers(sections), sections)
    assert "$ qlora recipe schema --help" in text
    assert "| `train.lr` | a number > 0 | `0.0002` |" in text


@pytest.mark.parametrize(
    ("page", "missing"),
    [
        (page, line)
        for page, names in make_docs.PAGES.items()
        for line in markers(names).splitlines()
    ],
)
def test_a_missing_marker_is_reported(checkout: Path, page: str, missing: str) -> None:
    (checkout / page).write_text((checkout / page).read_text().replace(missing, ""))
    assert any("exactly once" in fault for fault in check_docs.check(checkout))


FAULTS = [
    ("[x](nowhere.md)", "nowhere.md leads nowhere"),
    ("`tools/nothing`", "tools/nothing does not exist"),
    ("```bash\ntools/nothing\n```", "tools/nothing does not exist"),
    ("```bash\n$ qlora trian x\n```", "there is no command trian"),
    ("```bash\nqlora plan x --vrma 24GiB\n```", "plan has no option --vrma"),
    ("```bash\nqlora plan x \\\n  --vrma 24GiB\n```", "plan has no option --vrma"),
    ("```bash\nqlora train x train.lrr=1\n```", "there is no setting train.lrr"),
    ("```bash\nqlora train recipes/nothing.yaml\n```", "no shipped recipe"),
    ("`qlora recipe list|shwo`", "there is no command shwo"),
]


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md", "docs/other.md"])
@pytest.mark.parametrize(("text", "expected"), FAULTS)
def test_a_fault_is_found(checkout: Path, page: str, text: str, expected: str) -> None:
    with (checkout / page).open("a") as file:
        file.write(f"\n{text}\n")
    assert any(fault.startswith(f"{page}: ") for fault in check_docs.check(checkout))
    assert any(expected in fault for fault in check_docs.check(checkout))


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
def test_a_correct_page_has_no_fault(checkout: Path, text: str) -> None:
    with (checkout / "README.md").open("a") as file:
        file.write(f"\n{text}\n")
    assert check_docs.check(checkout) == []


def test_a_stale_section_is_reported(checkout: Path) -> None:
    page = checkout / "docs" / "cli.md"
    text = page.read_text()
    first_help = re.search(r"(?m)^  \w.*\.$", text)
    assert first_help is not None
    page.write_text(text.replace(first_help[0], "  Do it."))
    assert any("stale" in fault for fault in check_docs.check(checkout))


def test_a_missing_page_is_reported(checkout: Path) -> None:
    (checkout / "README.md").unlink()
    assert check_docs.check(checkout) == ["README.md is missing"]


def test_a_long_readme_is_reported(checkout: Path) -> None:
    (checkout / "README.md").write_text("line\n" * (check_docs.README_LINES + 1))
    assert check_docs.check(checkout) == ["README.md: it has 151 lines; 150 are allowed"]


def test_a_wrong_layer_table_is_reported(checkout: Path) -> None:
    page = checkout / "docs" / "architecture.md"
    page.write_text(page.read_text().replace("| `nn/` | x |\n", ""))
    assert any("layer table" in fault for fault in check_docs.check(checkout))
