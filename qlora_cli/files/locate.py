"""Where a base lies: the embedded starter, a folder, or the hub's cache."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError

STARTER = "starter"
"""The name of the embedded base."""
STARTER_FOLDER = Path(str(resources.files("qlora_cli.starter")))
_CONFIG = "config.json"
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_LEAST_ITEM_BYTES = 2
NO_CODE_HINT = (
    "qlora does not run code from a model folder; use a base of a family that transformers supports"
)
"""What follows from a folder that needs Python code of its own."""
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def find_base(name: str, revision: str | None) -> Path:
    """The folder that holds the base's config, weights and tokenizer; fetched where it must be.

    Raises ModelError where there is no such folder and the hub does not give it.
    """
    local = _local(name)
    if local is None:
        return _from_hub(name, revision, _FILES)
    if not (local / _CONFIG).is_file():
        raise ModelError(
            f"no {_CONFIG} in the folder {local}",
            where="model.name",
            hint="name a folder that holds config.json and safetensors files",
        )
    return local


def find_config(name: str, revision: str | None) -> Path:
    """The base's config.json alone, which is all that a plan reads. A .json file may be named."""
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ModelError(f"no file {path}", where="model.name")
        return path
    local = _local(name)
    return (find_base(name, None) if local else _from_hub(name, revision, [_CONFIG])) / _CONFIG


def read_config(file: Path) -> Any:
    """transformers' config object of a config.json.

    Code that its auto_map names is not run. Raises ModelError on a config that describes no model
    or that needs such code.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        content = json.loads(file.read_text())
        model_type = content.pop("model_type")
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror or fault}", where=str(file)) from fault
    except (ValueError, KeyError, AttributeError, TypeError) as fault:
        raise ModelError(f"not a model's config: {fault!r}", where=str(file)) from fault
    if "quantization_config" in content:
        raise ModelError(
            "this base is quantized already",
            where=str(file),
            hint="name the 16-bit model it was made from; qlora quantizes it as it loads",
        )
    check_auto_map(content, file)
    # Without it transformers has no code to load later, when it makes the model.
    if content.pop("auto_map", None) and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"its config needs Python code of its own: transformers has no model type "
            f"{model_type!r}",
            where=str(file),
            hint=NO_CODE_HINT,
        )
    try:
        config = AutoConfig.for_model(model_type, **content)
        _check_sizes(config)
    except (ValueError, TypeError, StrictDataclassError) as fault:
        raise ModelError(f"it describes no model: {fault}", where=str(file)) from fault
    return config


def check_auto_map(content: dict[str, Any], file: Path) -> None:
    """Raises ModelError where auto_map in a config of transformers has a wrong type.

    content: of the config. file: where it was read. Old tokenizer configs have a list.
    """
    if "auto_map" in content and not isinstance(content["auto_map"], dict | list):
        found = content["auto_map"]
        raise ModelError(f"damaged: auto_map is {found!r}, not an object", where=str(file))


def _check_sizes(config: Any) -> None:
    """Raises ValueError for what no model can have; transformers finds it when it computes."""
    for key in _SIZES:
        size = getattr(config, key, None)
        if size is not None and size < 1:
            raise ValueError(f"{key} is {size}")
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} of keys and values")
    dtype = getattr(config, "dtype", None)
    if dtype is not None and dtype.itemsize < _LEAST_ITEM_BYTES:
        raise ValueError(f"its weights are in {dtype}, and 16 or 32 bit are needed")


def _local(name: str) -> Path | None:
    if name == STARTER:
        return STARTER_FOLDER
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no folder {name}", where="model.name", hint=_nearby(name))
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as fault:
        raise ModelError(f"{name!r} is no folder and no hub id", where="model.name") from fault
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        summary = str(fault).strip().splitlines()[0]
        raise ModelError(
            f"{name!r} is no folder here, and the hub does not give it: {summary}",
            where="model.name",
            hint="check the name and the network, log in for a gated model (`hf auth login`), or "
            "name a folder",
        ) from fault


def _nearby(name: str) -> str | None:
    parent = Path(name).expanduser().parent
    if not parent.is_dir():
        return f"{parent} is no folder either"
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(Path(name).name, names, n=3)
    return f"did you mean {', '.join(str(parent / found) for found in near)}?" if near else None
