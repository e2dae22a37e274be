"""PEFT's adapter format: file names, tensor names and the settings of `adapter_config.json`.

`PeftConfig` has a field for each setting that affects the output of a LoRA adapter. Any other
setting that PEFT writes either has no effect on a finished adapter (`_INERT`) or belongs to a
feature that this package does not have. An adapter with such a feature is refused, because without
it the model would silently give other results.

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

from qlora_cli.adapters.expressions import ExpressionError, expression
from qlora_cli.errors import ModelError

CLASSIFICATION = "SEQ_CLS"
"""PEFT's `task_type` of a sequence classifier, whose head is saved with the adapter."""
NO_TARGETS = "dummy-target-modules"
"""PEFT's value of `target_modules` for an adapter of `modules_to_save` alone."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_BLOCKS = re.compile(r"[\w.]+")
"""Names of the list of blocks in `layers_pattern`. PEFT inserts them into an expression."""
_Rank = Annotated[int, Field(ge=1, lt=2**31)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_NEUTRAL_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Initializations of A and B that do not change the base; PiSSA, OLoRA, CorDA and LoftQ do."""
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
"""Keys that have no effect on an adapter whose other settings are supported."""


class PeftConfig(BaseModel):
    """The settings of `adapter_config.json` that affect the output. Field names are PEFT's."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str = "LORA"
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = True
    r: _Rank
    lora_alpha: _Finite
    lora_dropout: _Finite = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, _Rank] = {}
    alpha_pattern: dict[str, _Finite] = {}
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def rank(self, path: str) -> int:
        """Return the rank of the layer at `path`: the number of rows of A."""
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, self._key(path)), self.r)

    def alpha(self, path: str) -> float:
        """Return the alpha of the layer at `path`."""
        key = _pattern_of(self.alpha_pattern, self._key(path))
        return self.alpha_pattern.get(key, self.lora_alpha)

    def _key(self, path: str) -> str:
        """Return what patterns are compared with: the parameter of a linear that targets it."""
        weight = f"{path}.weight"
        return weight if self.targets_parameter(weight) else path

    def scaling(self, path: str) -> float:
        """Return the factor of B A at `path`: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        rank = self.rank(path)
        return self.alpha(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Return whether PEFT adapts the linear layer at `path`."""
        if self.exclude_modules and _matches(self.exclude_modules, path):
            return False
        if self.targets_parameter(f"{path}.weight"):
            return True
        if isinstance(self.target_modules, str):
            is_all = self.target_modules.lower() == "all-linear"
            return is_all or _matches(self.target_modules, path)
        # PEFT does not check the block's number if the list contains the complete path.
        targets = self.target_modules or []
        matches = _matches(targets, path)
        return path in targets or (matches and self._is_in_adapted_block(path))

    def targets_parameter(self, path: str) -> bool:
        """Return whether PEFT adapts the parameter at `path`, a stack of experts."""
        return _matches(self.target_parameters or [], path)

    def _is_in_adapted_block(self, path: str) -> bool:
        """Return whether `layers_to_transform` includes the block of `path`."""
        if self.layers_to_transform in (None, []):
            return True
        adapted = self.layers_to_transform
        index = _block_index(path, self.layers_pattern)
        return index == adapted if isinstance(adapted, int) else index in (adapted or ())


def read_peft_config(folder: Path) -> PeftConfig:
    """Read the settings of the adapter in `folder`.

    Raises ModelError if they are missing, damaged or use a feature that is not supported.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(
            f"no {CONFIG} in {folder}",
            hint="an adapter's folder contains this file and the weights",
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
    if config.target_modules is None and not config.target_parameters:
        raise ModelError("target_modules: neither modules nor parameters", where=str(file))
    _check_expressions(config, file)
    return config


def _refuse_features(content: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError if the adapter uses an unsupported feature.

    Call it before parsing the settings: another adapter method has settings of other names.
    """
    kind = content.get("peft_type", "LORA")
    features = dict(_features(content)) if kind == "LORA" else {"peft_type": kind}
    if features:
        text = ", ".join(f"{key}: {json.dumps(value)}" for key, value in sorted(features.items()))
        raise ModelError(
            f"the adapter uses settings that are not supported: {text}",
            where=str(file),
            hint="supported: LoRA on linear layers of a causal language model or a sequence "
            "classifier, with alpha / rank or rsLoRA scaling, rank patterns and alpha patterns, "
            "on stacked experts, and DoRA",
        )


def _features(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of each setting that belongs to an unsupported feature."""
    allowed: dict[str, tuple[Any, ...]] = {
        "task_type": (None, "CAUSAL_LM", CLASSIFICATION),
        "bias": ("none",),
        "init_lora_weights": (None, *_NEUTRAL_INITS),
    }
    if isinstance(content.get("target_modules"), str):
        # PEFT does not define this combination and refuses it.
        allowed["layers_to_transform"] = (None,)
    if content.get("task_type") != CLASSIFICATION:
        allowed["modules_to_save"] = (None, [])
    if content.get("target_parameters"):
        allowed["use_dora"] = (None, False)
    for key, value in content.items():
        if key in allowed and value not in allowed[key]:
            yield key, value
        if value and key not in PeftConfig.model_fields and key not in _INERT:
            yield key, value


def _check_expressions(config: PeftConfig, file: Path) -> None:
    """Raise ModelError if a setting is no regular expression, or one that is not supported."""
    whole = [config.target_modules, config.exclude_modules]
    patterns = [text for text in whole if isinstance(text, str)]
    for pattern in (*patterns, *config.rank_pattern, *config.alpha_pattern):
        try:
            expression(pattern)
        except ExpressionError as fault:
            raise _unusable(pattern, fault, file) from fault
    for name in _names_of_blocks(config.layers_pattern):
        if not _BLOCKS.fullmatch(name):
            raise ModelError(f"layers_pattern: {name[:60]!r} is not a name", where=str(file))


def _unusable(pattern: str, fault: ExpressionError, file: Path | None = None) -> ModelError:
    return ModelError(
        f"{pattern[:60]!r} cannot be used: {fault}",
        where=CONFIG if file is None else str(file),
        hint="name the modules in a list, or write a simpler expression",
    )


def shortest_endings(
    chosen: Collection[str], modules: Iterable[str], min_parts: int = 1
) -> list[str]:
    """Return the shortest endings of paths that PEFT resolves to exactly the `chosen` modules.

    The ending is `q_proj` if every q_proj of the model is chosen. Otherwise it is longer; the
    longest one is the complete path.

    chosen: paths of the adapted modules. modules: paths of all modules of the model. min_parts:
    number of names that an ending has at least.
    """
    wanted = set(chosen)
    paths_by_ending: dict[str, set[str]] = {}
    for module in modules:
        for ending in _endings(module)[min_parts - 1 :]:
            paths_by_ending.setdefault(ending, set()).add(module)
    return sorted(
        {
            next(e for e in _endings(path)[min_parts - 1 :] if paths_by_ending[e] <= wanted)
            for path in chosen
        }
    )


def _endings(path: str) -> list[str]:
    """Return the endings of a dotted path, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _matches(modules: str | list[str], path: str) -> bool:
    """Return whether a regular expression or a list of endings matches `path`."""
    if isinstance(modules, str):
        return _fits(modules, path, (0,))
    return any(path == name or path.endswith(f".{name}") for name in modules)


def _pattern_of(patterns: Mapping[str, object], path: str) -> str:
    """Return the first pattern that matches `path`, or `path` itself if none does.

    A pattern matches the complete path, or a part of it that begins after a dot.
    """
    starts = (0, *(at + 1 for at, character in enumerate(path) if character == "."))
    return next((key for key in patterns if _fits(key, path, starts)), path)


def _fits(pattern: str, path: str, starts: Iterable[int]) -> bool:
    """Return whether a pattern matches `path` from one of some positions to its end.

    Raises ModelError if that takes too long.
    """
    try:
        return expression(pattern).matches(path, starts)
    except ExpressionError as fault:
        raise _unusable(pattern, fault) from fault


def _block_index(path: str, pattern: str | list[str] | None) -> int | None:
    """Return the number of the block in `path`, or None if there is none.

    pattern: names of the list of blocks; without it, the first number in the path is used.
    """
    for name in _names_of_blocks(pattern) or [r"[^.]*"]:
        match = re.match(rf"(?:^|.*?\.){name}\.(\d{{1,9}})\.", path)
        if match is not None:
            return int(match[1])
    return None


def _names_of_blocks(pattern: str | list[str] | None) -> list[str]:
    return [pattern] if isinstance(pattern, str) and pattern else list(pattern or ())
