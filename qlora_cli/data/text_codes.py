"""The kinds of findings about the characters of a text."""

from __future__ import annotations

from qlora_cli.data.finding_code import Code

TEXT_CODES = (
    Code(
        "mojibake",
        "warning",
        "UTF-8 text was read in another encoding (`Ã©` for `é`)",
        "read the source as UTF-8 and write the file again",
    ),
    Code(
        "replacement-character",
        "warning",
        "U+FFFD stands for characters that were lost in decoding",
        "read the source in its own encoding and write the file again",
    ),
    Code(
        "control-characters",
        "warning",
        "a text contains control or NUL characters",
        "remove them",
    ),
    Code(
        "byte-order-mark",
        "warning",
        "a text contains a byte order mark (U+FEFF)",
        "read the source as utf-8-sig",
    ),
    Code(
        "invisible-characters",
        "warning",
        "a text contains zero-width spaces or direction marks, which change its tokens",
        "remove U+200B, U+2060 and U+202A to U+202E",
    ),
    Code(
        "html",
        "warning",
        "texts contain HTML tags or entities such as `&amp;`",
        "convert them to plain text (html.unescape)",
        share=0.02,
    ),
    Code(
        "literal-newlines",
        "warning",
        r"texts contain the two characters `\n` in place of a line break",
        "replace them by line breaks",
        share=0.02,
    ),
)
