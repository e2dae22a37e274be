"""Measures what a model's own forward method does before and after its head, a linear.

After the head: the method runs once with a stub in place of the backbone, which returns chosen
hidden states, and with an identity as the head. So the logits are a function of the chosen values,
and the package's `LogitTransform` is read off: the slope at 0 is the scale, and the limit is the
soft cap.

Before the head: some models compute more there, such as BERT a linear, an activation and a norm.
`head_input` runs this code of theirs, for the loss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.files.composed import text_config_of
from qlora_cli.models.registry import unsupported
from qlora_cli.nn.logits import LogitTransform

_WIDTH = 8
_TINY, _HUGE = 2.0**-20, 2.0**30
_TOLERANCE = 1e-5


class _Output(tuple[Tensor, ...]):
    """The output of a backbone as a tuple and as an object; every other field is None.

    The second item is the output of a pooler, if the backbone has one.
    """

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class StubBackbone(nn.Module):
    """Returns `hidden` for any arguments.

    Its attributes are those of the backbone `of`. A part, such as `decoder`, is the stub itself.
    """

    def __init__(self, of: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["of"] = of
        self.__dict__["hidden"] = hidden

    def forward(self, *_: Any, **__: Any) -> _Output:
        """Return `hidden`, and the output of the backbone's pooler for it."""
        pooler = getattr(self.of, "pooler", None)
        if pooler is None:
            return _Output((self.hidden,))
        activation = getattr(self.of, "pooler_activation", None)
        if activation is None:
            return _Output((self.hidden, pooler(self.hidden)))
        return _Output((self.hidden, activation(pooler(self.hidden[:, 0]))))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.of, name)
        return self if isinstance(value, nn.Module) else value


class _StubHead(nn.Module):
    """Stores its input in `seen`, and returns `output`, or the input if that is None.

    weight: some models read its dtype.
    """

    def __init__(self, weight: Tensor, output: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__.update(weight=weight, output=output, seen=None)

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["seen"] = x
        output: Tensor | None = self.__dict__["output"]
        return x if output is None else output


@dataclass(frozen=True)
class HeadCode:
    """The code around a head.

    transform: what follows the head. has_own_input: the head's input is not the backbone's output,
    but what `head_input` returns.
    """

    transform: LogitTransform
    has_own_input: bool


def measured_head(model: Any, backbone: str, head: str) -> HeadCode:
    """Return what the forward method of `model` does before and after its head.

    model: on meta. backbone, head: paths of these modules. Raises ModelError if the method computes
    something else than a scale and a soft cap after the head.
    """
    samples = [
        _TINY,
        _HUGE,
        *(sign * 2.0**exponent for exponent in range(-3, 8) for sign in (1, -1)),
    ]
    z = torch.tensor(samples, device="cpu")[None, :, None].expand(1, -1, _WIDTH).contiguous()
    width = text_config_of(model).hidden_size
    on_meta = torch.empty(1, len(samples), width, dtype=model.dtype, device="meta")
    fault: Exception | None = None
    for hidden, stub in ((z, _StubHead(z)), (on_meta, _StubHead(on_meta, z))):
        try:
            with torch.no_grad():
                logits = _stubbed(model, backbone, head, hidden, stub).logits
            transform = _fit(logits.float(), z)
        except Exception as error:  # Code of any model class runs here.
            fault = fault or error
            continue
        if transform is not None:
            return HeadCode(transform, has_own_input=hidden is on_meta)
    if fault is None:
        raise unsupported(
            model.config, "its logits are not the head's output times a scale, with a soft cap"
        )
    text = str(fault).strip().splitlines() or [type(fault).__name__]
    reason = f"the code around its head cannot be examined: {text[0]}"
    raise unsupported(model.config, reason) from fault


def head_input(model: Any, backbone: str, head: str, hidden: Tensor) -> Tensor:
    """Return what the code of `model` computes before its head, of shape (tokens, head's width).

    hidden: the backbone's output (tokens, d). backbone, head: paths of these modules.
    """
    stub = _StubHead(hidden)
    _stubbed(model, backbone, head, hidden[None], stub)
    seen: Tensor = stub.__dict__["seen"]
    return seen.squeeze(0)


def _stubbed(model: Any, backbone: str, head: str, hidden: Tensor, stub: _StubHead) -> Any:
    """Run the forward method of `model` on hidden states (1, n, d), with a stub as its head."""
    stub_backbone = StubBackbone(model.get_submodule(backbone), hidden)
    stubbed = with_module(with_module(model, backbone, stub_backbone), head, stub)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return stubbed(input_ids=ids, use_cache=False)


def _fit(logits: Tensor, z: Tensor) -> LogitTransform | None:
    """Return the transformation of z that gives `logits`, both (1, n, V); None if none does."""
    scale = logits[0, 0, 0].item() / _TINY
    limit = logits[0, 1, 0].item()
    is_capped = abs(limit) < abs(scale) * _HUGE / 2
    found = LogitTransform(scale, abs(limit) if is_capped else None)
    expected = found.apply_(z.clone())
    is_same = torch.allclose(logits, expected, rtol=_TOLERANCE, atol=0.0)
    return found if is_same and scale != 0.0 else None


def with_module(module: nn.Module, path: str, new: nn.Module) -> Any:
    """Return a shallow copy of `module` that has `new` at `path`. `module` is not changed."""
    name, _, rest = path.partition(".")
    changed = copy.copy(module)
    changed.__dict__["_modules"] = dict(module._modules)
    child = module.get_submodule(name)
    changed._modules[name] = with_module(child, rest, new) if rest else new
    return changed
