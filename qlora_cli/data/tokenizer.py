"""The base's tokenizer, loaded in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.files.locate import NO_CODE_HINT, STARTER, STARTER_FOLDER, check_auto_map

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a folder, a hub id or `starter`; None of a folder that holds none.

    Code that its auto_map names is not run. Raises ModelError where the tokenizer needs such code,
    is damaged, empty, not a fast one, or not to be had.
    """
    folder = STARTER_FOLDER if name == STARTER else Path(name).expanduser()
    local = folder.is_dir()
    if local and not any((folder / file).is_file() for file in _FILES):
        # transformers would make an empty tokenizer out of config.json alone, in silence.
        return None
    if local:
        _check_json(folder)
    tokenizer = _load(str(folder) if local else name, None if local else revision)
    if not tokenizer.is_fast:
        raise ModelError(
            "its tokenizer is a slow one, which does not say where its tokens stand",
            where=name,
            hint="it needs a tokenizer.json; transformers makes one with save_pretrained",
        )
    if len(tokenizer) < 2:
        raise ModelError("its tokenizer is empty", where=name, hint="its files are incomplete")
    return tokenizer


def _load(source: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise _unloadable(source, error) from error
    except Exception as error:
        # The Rust library raises a bare Exception for a file that it cannot make sense of, so
        # that nothing narrower can be caught; anything else goes its way.
        if type(error) is not Exception:
            raise
        raise _unloadable(source, error) from error


def _unloadable(source: str, error: Exception) -> ModelError:
    # The argument's name is in transformers' error where the folder has code and needs it.
    if "trust_remote_code" in str(error):
        return ModelError(
            "its tokenizer needs Python code of its own",
            where=source,
            hint=f"{NO_CODE_HINT}, or one with a tokenizer.json that loads without code",
        )
    summary = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"its tokenizer cannot be loaded: {summary}",
        where=source,
        hint="name a folder with tokenizer.json, or a hub id; check the network",
    )


def _check_json(folder: Path) -> None:
    """The Rust library's complaint about a broken file does not name the file."""
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            raise ModelError(f"damaged: {error}", where=str(path)) from error
        whole = isinstance(content, dict) and (
            path.name != "tokenizer.json" or isinstance(content.get("model"), dict)
        )
        if not whole:
            raise ModelError("damaged: it describes no tokenizer", where=str(path))
        check_auto_map(content, path)
