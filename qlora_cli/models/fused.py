"""The rows of each role in a fused linear of a derived family.

A fused linear has roles only if each role has consecutive rows. Gate and up are found by computing
the MLP on small numbers. The rows of q, k and v follow from the config, for the model types in
`_QKV`; a test computes each of them. Others, such as GPT-NeoX and BLOOM, alternate between the rows
of q, k and v head by head. Such a linear has its own name as its only role.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

GATE_UP = ("gate_up_proj", "input_linear", "Wi")
"""Names of linears that have gate and up in two halves in some classes."""
_SIZE = 5
"""Number of rows of each half in the small computation."""

_Rows = Mapping[str, slice]
_QKV: Mapping[tuple[str, str], Callable[[Any], bool]] = {
    ("phi3", "qkv_proj"): lambda config: True,
    ("mpt", "Wqkv"): lambda config: True,
    ("modernbert", "Wqkv"): lambda config: True,
    ("openai-gpt", "c_attn"): lambda config: True,
    ("gpt_bigcode", "c_attn"): lambda config: config.multi_query,
    ("falcon", "query_key_value"): lambda config: (
        config.multi_query and not config.new_decoder_architecture
    ),
}
"""(model type, name of the linear) -> whether its rows are those of q, then k, then v."""


def fused_rows(config: Any, path: str, blocks: Sequence[nn.Module]) -> _Rows | None:
    """Return each role's rows of the linear at `path` of a block; None if it has one role.

    config: of the model. blocks: all blocks, some of which may lack the linear.
    """
    parent, _, name = path.rpartition(".")
    owners = [dict(block.named_modules()).get(parent) for block in blocks]
    found: list[Any] = [getattr(owner, name) for owner in owners if hasattr(owner, name)]
    sizes = {_num_rows(linear) for linear in found}
    if len(sizes) != 1:
        return None
    (num_rows,) = sizes
    if name in GATE_UP:
        owner = next(owner for owner in owners if owner is not None and hasattr(owner, name))
        first, second = _halves(owner, name) or ("", "")
        half = num_rows // 2
        return {first: slice(0, half), second: slice(half, num_rows)} if first else None
    is_known = _QKV.get((config.model_type, name))
    return _qkv_rows(config, num_rows) if is_known is not None and is_known(config) else None


def _num_rows(linear: Any) -> int:
    rows: int = linear.nf if isinstance(linear, Conv1D) else linear.out_features
    return rows


def _qkv_rows(config: Any, num_rows: int) -> _Rows | None:
    """Return the rows of q, k and v, of which the first has one head for each query head."""
    width = config.hidden_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries = head * config.num_attention_heads
    keys, rest = divmod(num_rows - queries, 2)
    if keys <= 0 or rest:
        return None
    return {
        "q": slice(0, queries),
        "k": slice(queries, queries + keys),
        "v": slice(queries + keys, num_rows),
    }


def _halves(mlp: nn.Module, name: str) -> tuple[str, str] | None:
    """Return the roles of both halves of a fused linear; None if they are not gate and up.

    The output of down(act(gate) * up) is proportional to up, and not to gate.
    """
    first, second = (torch.linspace(0.5, 1.5, _SIZE, device="cpu") * sign for sign in (1, -1))
    with suppress(Exception), torch.no_grad():  # Code of any model class runs here.
        once = _run(mlp, name, first, second)
        twice_first = _run(mlp, name, 2 * first, second)
        twice_second = _run(mlp, name, first, 2 * second)
        in_first, in_second = (
            torch.allclose(found, 2 * once, rtol=1e-5) for found in (twice_first, twice_second)
        )
        if in_first != in_second:
            return ("up", "gate") if in_first else ("gate", "up")
    return None


def _run(mlp: nn.Module, name: str, first: Tensor, second: Tensor) -> Tensor:
    """Return the output of an MLP whose fused linear has the output [first, second]."""
    toy = copy.copy(mlp)
    toy.__dict__["_modules"] = dict(mlp._modules)
    for child, module in mlp.named_children():
        if child == name:
            toy._modules[child] = _Constant(torch.cat([first, second])[None])
        elif isinstance(module, nn.Linear):
            toy._modules[child] = nn.Identity()
    output: Tensor = toy(torch.zeros(1, _SIZE))
    return output


class _Constant(nn.Module):
    """A module whose output does not depend on its input."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value
