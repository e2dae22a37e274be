"""PEFT's adapter format: its file names, its keys and the settings of `adapter_config.json`.

Only what decides the adapter's product is a field here. Everything else that PEFT can write either
changes nothing for a finished LoRA adapter (`_INERT`) or is a feature that this package does not
have, and then the adapter is refused: loading it without would answer differently in silence.
Source: peft 0.21.2, `tuners/lora/config.py`, `check_target_module_exists`, `get_pattern_key`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_cli.errors import ModelError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to start A and B that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it."""
_INERT = {
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
}
"""Keys without effect on an adapter whose other settings are supported."""


class PeftConfig(BaseModel):
    """`adapter_config.json`, as far as it decides the product. Field names are PEFT's."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str = "LORA"
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = True
    r: Annotated[int, Field(ge=1)]
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def rank(self, path: str) -> int:
        """Rows of the layer's A."""
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, path), self.r)

    def alpha(self, path: str) -> float:
        """The layer's alpha."""
        return self.alpha_pattern.get(_pattern_of(self.alpha_pattern, path), self.lora_alpha)

    def scaling(self, path: str) -> float:
        """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with rslora."""
        rank = self.rank(path)
        return self.alpha(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether PEFT would adapt the linear at this path."""
        if self.exclude_modules and _names(self.exclude_modules, path):
            return False
        if isinstance(self.target_modules, str):
            everything = self.target_modules.lower() == "all-linear"
            return everything or _names(self.target_modules, path)
        # Where the list names the whole path, PEFT does not ask for the layer's number.
        named = _names(self.target_modules, path)
        return path in self.target_modules or (named and self._transforms(path))

    def _transforms(self, path: str) -> bool:
        if self.layers_to_transform in (None, []):
            return True
        wanted = self.layers_to_transform
        index = _layer_index(path, self.layers_pattern)
        return index == wanted if isinstance(wanted, int) else index in (wanted or ())


def read_peft_config(folder: Path) -> PeftConfig:
    """The adapter's settings. Raises ModelError where they are damaged or not supported."""
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(
            f"no {CONFIG} in {folder}", hint="an adapter's folder holds it beside its weights"
        )
    try:
        content = json.loads(file.read_bytes())
    except ValueError as fault:
        raise ModelError(f"Invalid JSON: {fault}", where=str(file)) from fault
    if isinstance(content, dict):
        _refuse_features(content, file)
    try:
        config = PeftConfig.model_validate(content)
    except ValidationError as fault:
        first = fault.errors()[0]
        key = f"{first['loc'][0]}: " if first["loc"] else ""
        raise ModelError(f"{key}{first['msg']}", where=str(file)) from fault
    for pattern in (*config.rank_pattern, *config.alpha_pattern, *_expressions(config)):
        _check_expression(pattern, file)
    return config


def _refuse_features(content: Mapping[str, Any], file: Path) -> None:
    """Before the settings themselves are looked at: another method's have other names."""
    kind = content.get("peft_type", "LORA")
    features = dict(_features(content)) if kind == "LORA" else {"peft_type": kind}
    if features:
        told = ", ".join(f"{key}: {json.dumps(value)}" for key, value in sorted(features.items()))
        raise ModelError(
            f"the adapter uses what is not supported: {told}",
            where=str(file),
            hint="supported is LoRA on linear layers of a causal language model, with alpha / rank "
            "or rsLoRA scaling and rank and alpha patterns",
        )


def _features(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that change the product in a way that this package does not have."""
    allowed: dict[str, tuple[Any, ...]] = {
        "task_type": (None, "CAUSAL_LM"),
        "bias": ("none",),
        "modules_to_save": (None, []),
        "init_lora_weights": (None, *_PLAIN_STARTS),
    }
    if isinstance(content.get("target_modules"), str):
        # PEFT does not say what it would mean, and refuses it.
        allowed["layers_to_transform"] = (None,)
    for key, value in content.items():
        if key in allowed and value not in allowed[key]:
            yield key, value
        if value and key not in PeftConfig.model_fields and key not in _INERT:
            yield key, value


def _expressions(config: PeftConfig) -> list[str]:
    single = [config.target_modules, config.exclude_modules, config.layers_pattern]
    several = config.layers_pattern if isinstance(config.layers_pattern, list) else []
    return [text for text in [*single, *several] if isinstance(text, str)]


def _check_expression(pattern: str, file: Path) -> None:
    try:
        re.compile(pattern)
    except re.error as fault:
        raise ModelError(f"{pattern!r} is no regular expression", where=str(file)) from fault


def key_of(path: str, factor: str) -> str:
    """The tensor's name in the file: `base_model.model.<path>.lora_A.weight`."""
    return f"{_PREFIX}{path}.lora_{factor}.weight"


def path_of(key: str) -> tuple[str, str] | None:
    """(path, `A` or `B`) of a tensor's name; None where it is no LoRA factor of a linear."""
    match = _KEY.fullmatch(key)
    return (match["path"], match["factor"]) if match else None


def shortest_names(chosen: Collection[str], modules: Iterable[str]) -> list[str]:
    """Endings that PEFT resolves to exactly `chosen` among all of a model's modules.

    `q_proj` where every q_proj is chosen; a longer ending, at last the whole path, where not.
    """
    wanted = set(chosen)
    meant: dict[str, set[str]] = {}
    for module in modules:
        for ending in _endings(module):
            meant.setdefault(ending, set()).add(module)
    return sorted({next(e for e in _endings(path) if meant[e] <= wanted) for path in chosen})


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _names(wanted: str | list[str], path: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _pattern_of(patterns: Mapping[str, object], path: str) -> str:
    """The first pattern that means the path; the path itself where none does."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), path)


def _layer_index(path: str, pattern: str | list[str] | None) -> int | None:
    """The block's number in a path: of the first list that `pattern` names, or of any list."""
    names = [pattern] if isinstance(pattern, str) else pattern
    for name in names if names and pattern else [r"[^.]*"]:
        match = re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path)
        if match is not None:
            return int(match[1])
    return None
