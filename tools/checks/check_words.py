"""Lists words of the project's old vocabulary, so that they do not return.

    python tools/checks/check_words.py [PATH ...]

Each entry of `WORDS` is a pattern and what to write instead. Code, comments, docstrings, help
texts and Markdown are searched; a line that quotes a word on purpose ends with `words: allow`.
Prints each finding as `file:line: word -> replacement` and exits 1 if there is one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WORDS = {
    r"\btold\b|\btells?\b": "reported, printed, returned",
    r"\broads?\b": "code path",
    r"\bworst instants?\b": "peak",
    r"\bgo(?:es)? on (?:with|after|from|as)\b|\bgoes on\b|\bgoing on\b": "resume, continue",
    r"\b(?:a|the|one|each|this|no|of|larger|CUDA) cards?\b": "GPU",
    r"\bimagin(?:e|es|ed|ing|ation)\b": "dry run, planned, on meta",
    r"\bspeakers?\b": "model, text generator",
    r"\bsurgery\b": "module replacement",
    r"\bjudg(?:e|es|ed|ing|ement)\b": "compare, evaluate",
    r"\bfirst choices?\b": "top-1",
    r"\bhow many?th\b": "index",
    r'"""Of ': "a docstring starts with what the function does",
}
"""Pattern -> what to write instead."""

ALLOWED = "words: allow"
_SUFFIXES = {".py", ".md", ".yaml", ".toml", ".html", ""}
_SKIPPED = (
    "tools/measurements/",
    "tools/starter/starter_task.py",  # its word lists are data
    "qlora_cli/starter/",
    "LICENSE",
    "tools/checks/check_words.py",
)


def check(files: Iterable[Path], root: Path = ROOT) -> Iterator[str]:
    """Yield one line for each word of the old vocabulary in `files`."""
    patterns = [(re.compile(word, re.IGNORECASE), use) for word, use in WORDS.items()]
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if ALLOWED in line:
                continue
            for pattern, use in patterns:
                found = pattern.search(line)
                if found:
                    yield f"{file.relative_to(root)}:{number}: {found[0].strip()} -> {use}"


def tracked_files(root: Path = ROOT) -> list[Path]:
    """Return the text files of the checkout that git tracks, without data and measurements."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        root / name
        for name in listed
        if Path(name).suffix in _SUFFIXES
        and not name.startswith(_SKIPPED)
        and (root / name).is_file()
    ]


def main() -> int:
    """Check the files named on the command line, or all tracked ones."""
    named = [Path(argument).resolve() for argument in sys.argv[1:]]
    files = [f for path in named for f in (path.rglob("*.py") if path.is_dir() else [path])]
    findings = list(check(files if named else tracked_files()))
    for finding in findings:
        print(finding)
    print(f"words: {len(WORDS)} patterns, {len(findings) or 'no'} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
