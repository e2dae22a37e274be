"""Load a base's tokenizer; nothing else in the package does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.files.locate import NO_CODE_HINT, STARTER, STARTER_FOLDER, check_auto_map
from qlora_cli.files.paths import user_path

_MAX_FAULT = 1000
"""Characters of the description of a fault; it can repeat a part of a file."""
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a base, or None for a folder without tokenizer files.

    name: a folder, a hub id or `starter`. revision: of a hub id. Python code that the tokenizer's
    `auto_map` names is never run.
    Raises ModelError if the tokenizer needs such code, is damaged, empty or slow, or cannot be
    downloaded.
    """
    folder = STARTER_FOLDER if name == STARTER else user_path(name)
    local = folder.is_dir()
    if local and not any((folder / file).is_file() for file in _FILES):
        # From config.json alone, transformers would create an empty tokenizer without an error.
        return None
    if local:
        _check_json(folder)
    tokenizer = _load(str(folder) if local else name, None if local else revision)
    if not tokenizer.is_fast:
        raise ModelError(
            "its tokenizer is a slow one, which reports no character offsets of its tokens",
            where=name,
            hint="a tokenizer.json is needed; transformers writes one with save_pretrained",
        )
    with _loading_errors(name):
        tokenizer("a")
    if len(tokenizer) < 2:
        raise ModelError("its tokenizer is empty", where=name, hint="its files are incomplete")
    return tokenizer


def _load(source: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    with _loading_errors(source):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


@contextmanager
def _loading_errors(source: str) -> Iterator[None]:
    """Convert the errors of transformers and of the Rust library to ModelError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise _unloadable(source, error) from error
    except Exception as error:
        # The Rust library raises a bare Exception for an invalid file, so no narrower class can be
        # caught. Every other exception is raised again.
        if type(error) is not Exception:
            raise
        raise _unloadable(source, error) from error


def _unloadable(source: str, error: Exception) -> ModelError:
    # transformers' error contains the argument's name if the folder needs its own code.
    if "trust_remote_code" in str(error):
        return ModelError(
            "its tokenizer needs Python code of its own",
            where=source,
            hint=f"{NO_CODE_HINT}, or one with a tokenizer.json that loads without code",
        )
    summary = (str(error).strip().splitlines() or [type(error).__name__])[0][:_MAX_FAULT]
    return ModelError(
        f"its tokenizer cannot be loaded: {summary}",
        where=source,
        hint="name a folder with tokenizer.json, or a hub id; check the network",
    )


def _check_json(folder: Path) -> None:
    """Raise ModelError naming the file if a tokenizer file is damaged.

    The Rust library's own error does not name the file.
    """
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            raise ModelError(f"damaged: {error}", where=str(path)) from error
        is_tokenizer = isinstance(content, dict) and (
            path.name != "tokenizer.json" or isinstance(content.get("model"), dict)
        )
        if not is_tokenizer:
            raise ModelError("damaged: it does not describe a tokenizer", where=str(path))
        check_auto_map(content, path)
