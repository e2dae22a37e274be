"""The code blocks of the documentation."""

from __future__ import annotations

import re


def block(text: str, language: str) -> str:
    """Return the content of the first code block of a language. text: Markdown."""
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, language
    return found[1]
