"""Finds the linears, norms, MLPs and experts in the blocks of a model whose family is derived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError
from qlora_cli.files.composed import text_config_of
from qlora_cli.models.coverage import check_linear, check_mlp, check_norm
from qlora_cli.models.family import LinearSpec, MlpSpec, Rows
from qlora_cli.models.fused import fused_rows
from qlora_cli.models.weight_reads import read_weights
from qlora_cli.nn.mlp import ACTIVATIONS, Projections

ROLES: Mapping[str, str] = {
    "q_proj": "q",
    "query": "q",
    "query_proj": "q",
    "q_lin": "q",
    "k_proj": "k",
    "key": "k",
    "key_proj": "k",
    "k_lin": "k",
    "v_proj": "v",
    "value": "v",
    "value_proj": "v",
    "v_lin": "v",
    "out_lin": "o",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "fc1": "up",
    "fc_in": "up",
    "c_fc": "up",
    "dense_h_to_4h": "up",
    "lin1": "up",
    "ffn": "up",
    "down_proj": "down",
    "output_linear": "down",
    "fc2": "down",
    "fc_out": "down",
    "dense_4h_to_h": "down",
    "lin2": "down",
    "ffn_output": "down",
}
"""Name of a linear -> its role. A linear with another name has its own name as its role."""
_OUTPUTS = ("out_proj", "dense", "c_proj", "proj", "Wo")
"""Names that are used for the last linear of attention and of an MLP."""
_PROJECTIONS = (
    Projections(gate="gate_proj", up="up_proj", down="down_proj"),
    Projections(gate=None, up="up_proj", down="down_proj"),
    Projections(gate=None, up="fc1", down="fc2"),
    Projections(gate=None, up="c_fc", down="c_proj"),
    Projections(gate=None, up="dense_h_to_4h", down="dense_4h_to_h"),
    Projections(gate=None, up="fc_in", down="fc_out"),
)
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")


def has_experts(module: nn.Module) -> bool:
    """Return whether a module has stacked experts that `Experts` can replace."""
    is_stack = hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")
    return is_stack and not getattr(module, "has_post_expert_norm", False)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a plain linear or transformers' transposed one."""
    return isinstance(module, nn.Linear | Conv1D)


def _is_plain(module: nn.Module, path: str) -> bool:
    try:
        check_linear(module, path)
    except ModelError:
        return False
    return True


def modules_of(blocks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path in its block, module) of all blocks: those of the first block first."""
    for block in blocks:
        yield from block.named_modules()


def structure_of(block: nn.Module) -> set[tuple[str, str]]:
    """Return (path, class and shapes) of every module with tensors in a block."""
    return {
        (path, f"{type(child).__name__}{[tuple(p.shape) for p in child.parameters(recurse=False)]}")
        for path, child in block.named_modules()
    }


def linears_of(
    config: Any, blocks: Sequence[nn.Module], unquantized: Sequence[str]
) -> Iterator[LinearSpec]:
    """Yield the linears of all blocks except `unquantized`, each path once."""
    linears = {path: module for path, module in modules_of(blocks) if is_linear(module)}
    for path, module in linears.items():
        if path in unquantized:
            continue
        transposed = isinstance(module, Conv1D)
        if (rows := fused_rows(config, path, blocks)) is not None:
            yield LinearSpec(path, tuple(rows), transposed, _constant(rows))
        else:
            yield LinearSpec(path, (_role(path),), transposed)


def _constant(rows: Mapping[str, slice]) -> Rows:
    """Return a function that returns `rows` for any config, as the spec of a linear needs it."""
    return lambda _config: rows


def read_directly(blocks: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the paths of linears whose weights the code of the model reads itself.

    That is the code of their parent, or of the linear if it is not a plain one. A packed weight or
    an adapter would be ignored there, so such linears stay as they are.
    """
    for path, module in modules_of(blocks):
        if is_linear(module) and not _is_plain(module, path):
            yield path
        names = [name for name, child in module.named_children() if is_linear(child)]
        prefix = f"{path}." if path else ""
        if names:
            yield from (prefix + name for name in names if name in read_weights(module))


def norms_of(blocks: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the paths at which every block that has them has a norm of ours."""
    is_ours: dict[str, bool] = {}
    for path, module in modules_of(blocks):
        is_ours[path] = is_ours.get(path, True) and is_our_norm(module, path)
    yield from (path for path, ours in is_ours.items() if ours)


def _role(path: str) -> str:
    """Return the role of the linear at `path` within a block."""
    parent, _, name = path.rpartition(".")
    if parent == "intermediate" and name == "dense":
        return "up"
    if name in _OUTPUTS:
        if parent.endswith("intermediate"):
            return "up"
        return "o" if "att" in parent.lower() else "down"
    return ROLES.get(name, name)


def mlp_of(model: Any, blocks: Sequence[nn.Module]) -> MlpSpec | None:
    """Return the MLP that `Mlp` can replace, or None: then transformers' own one stays."""
    for path, module in modules_of(blocks):
        linears = {name for name, child in module.named_children() if is_linear(child)}
        for projections in _PROJECTIONS:
            if linears == set(projections.names):
                key = _activation_key(text_config_of(model), module, projections)
                return MlpSpec(path, projections, key) if key else None
    return None


def _activation_key(config: Any, module: nn.Module, projections: Projections) -> str | None:
    """Return the key of the config that names the MLP's activation, if `Mlp` computes the same."""
    for key in _ACTIVATION_KEYS:
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACTIVATIONS:
            try:
                check_mlp(module, "mlp", projections, ACTIVATIONS[name])
            except Exception:  # Code of any model class runs here.
                return None
            return str(key)
    return None


def is_our_norm(module: nn.Module, path: str) -> bool:
    """Return whether `RmsNorm` computes the same as this module."""
    if any(True for _ in module.children()) or not hasattr(module, "variance_epsilon"):
        return False
    try:
        check_norm(module, path)
    except (ModelError, TypeError):
        return False
    return True
