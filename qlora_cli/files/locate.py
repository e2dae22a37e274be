"""Finds a base model (the embedded starter, a folder, the hub's cache) and reads its config."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.files.atomic import PARSE_ERRORS
from qlora_cli.files.composed import language_config
from qlora_cli.files.hub import download
from qlora_cli.files.paths import user_path
from qlora_cli.files.quantized import KEY, MXFP4, check_readable, mark

STARTER = "starter"
"""The value of `model.name` that selects the embedded base."""
STARTER_FOLDER = Path(str(resources.files("qlora_cli.starter")))
_CONFIG = "config.json"
_SIZE_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_MIN_ITEM_BYTES = 2
_MAX_SIZE, _MAX_LAYERS = 2**31, 10_000
"""Upper bounds of sizes in a config, above all known models by far."""
_MAX_FAULT = 1000
"""Characters of transformers' description of a fault; it can repeat values of the file."""
NO_CODE_HINT = (
    "qlora does not run code from a model folder; use a base of a family that transformers supports"
)
"""Hint for a folder that needs Python code of its own."""
_TOKENIZER_PATTERNS = ["*.json", "*.model", "*.jinja", "*.txt"]
_FILE_PATTERNS = ["*.safetensors", *_TOKENIZER_PATTERNS]


def find_base(name: str, revision: str | None) -> Path:
    """Return the folder with the base's config, weights and tokenizer; download it if necessary.

    name: "starter", a folder, or a hub id.
    revision: of the hub's repository; None for its default.

    Raises ModelError if there is no such folder and the hub does not provide it.
    """
    local = _local(name)
    if local is None:
        return download(name, revision, _FILE_PATTERNS)
    if not (local / _CONFIG).is_file():
        raise ModelError(
            f"no {_CONFIG} in the folder {local}",
            where="model.name",
            hint="name a folder that contains config.json and safetensors files",
        )
    return local


def find_config(name: str, revision: str | None) -> Path:
    """Return the path of the base's config.json; download only this file if necessary.

    name: as in `find_base`, or a .json file. A plan needs the config alone.

    Raises ModelError if it cannot be found.
    """
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ModelError(f"no file {path}", where="model.name")
        return path
    local = _local(name)
    return (find_base(name, None) if local else download(name, revision, [_CONFIG])) / _CONFIG


def find_tokenizer(name: str, revision: str | None) -> Path:
    """Return the folder with the base's config and tokenizer; download them if necessary.

    The weights are not downloaded. Arguments and errors as of `find_base`; a local folder may
    contain a tokenizer alone.
    """
    return _local(name) or download(name, revision, _TOKENIZER_PATTERNS)


def read_config(file: Path) -> Any:
    """Return the transformers config object of a config.json.

    For a composed model, such as vision and text, that is the config of its language model (see
    `composed.py`).

    Code that `auto_map` names is never run.

    Raises ModelError if the file is damaged, describes no model, describes a quantized model whose
    weights cannot be read, or needs such code.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        content = json.loads(file.read_text())
        model_type = content.pop("model_type")
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror or fault}", where=str(file)) from fault
    except (ValueError, KeyError, AttributeError, TypeError) as fault:
        reason = repr(fault)[:_MAX_FAULT]
        raise ModelError(f"not a model's config: {reason}", where=str(file)) from fault
    packed_as = check_readable(content, str(file))
    content.pop(KEY, None)
    check_auto_map(content, file)
    # Without auto_map, transformers cannot load such code when it builds the model.
    if content.pop("auto_map", None) and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"its config needs Python code of its own: transformers has no model type "
            f"{model_type!r}",
            where=str(file),
            hint=NO_CODE_HINT,
        )
    try:
        config = AutoConfig.for_model(model_type, **_with_floats(content))
        config = language_config(config)
        mark(config, packed_as)
        if packed_as == MXFP4 and getattr(config, "dtype", None) is None:
            config.dtype = torch.bfloat16
        _check_sizes(config)
    except (*PARSE_ERRORS, StrictDataclassError) as fault:
        reason = str(fault)[:_MAX_FAULT]
        raise ModelError(f"it describes no model: {reason}", where=str(file)) from fault
    return config


def _with_floats(value: Any) -> Any:
    """Return a config's content with the numbers that transformers stores as {"__float__": text}.

    JSON has no infinity.
    """
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"}:
        return float(value["__float__"])
    return {key: _with_floats(item) for key, item in value.items()}


def check_auto_map(content: dict[str, Any], file: Path) -> None:
    """Raise ModelError if `auto_map` has a wrong type in a config of a model or a tokenizer.

    content: the parsed config.
    file: where it was read, for the message.
    """
    auto_map = content.get("auto_map", {})
    if not isinstance(auto_map, dict | list):  # Old tokenizer configs contain a list.
        raise ModelError(f"damaged: auto_map is {auto_map!r}, not an object", where=str(file))


def _check_sizes(config: Any) -> None:
    """Raise ValueError for sizes that no model can have; transformers would fail much later."""
    for key in _SIZE_KEYS:
        size = _size(config, key)
        if size is not None and not 1 <= size <= _MAX_SIZE:
            raise ValueError(f"{key} is {size}")
    layers = _size(config, "num_hidden_layers") or 1
    if layers > _MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers}")
    heads = _size(config, "num_attention_heads") or 1
    groups = _size(config, "num_key_value_heads") or heads
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} key and value heads")
    pad = getattr(config, "pad_token_id", None)
    vocab_size = getattr(config, "vocab_size", None)
    if pad is not None and vocab_size is not None and pad >= vocab_size:
        raise ValueError(f"pad_token_id is {pad}, and the vocabulary has {vocab_size} tokens")
    dtype = getattr(config, "dtype", None)
    if dtype is not None and dtype.itemsize < _MIN_ITEM_BYTES:
        raise ValueError(f"its weights are in {dtype}; 16 or 32 bits are required")


def _size(config: Any, key: str) -> int | None:
    """Return a size of a config; None if it has none, or if it differs between layers."""
    try:
        size = getattr(config, key, None)
    except RuntimeError:
        return None
    return None if isinstance(size, list | tuple) else size


def _local(name: str) -> Path | None:
    """Return the local folder with this name, or None if there is none."""
    if name == STARTER:
        return STARTER_FOLDER
    path = user_path(name)
    return path if path.is_dir() else None
