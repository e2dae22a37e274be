"""Measures what a model's own forward method does with the output of its head.

The method runs once with a stub in place of the backbone, which returns chosen hidden states, and
with an identity as the head. So the logits are a function of the chosen values, and the package's
`LogitTransform` is read off: the slope at 0 is the scale, and the limit is the soft cap.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

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


def measured_transform(model: Any, backbone: str, head: str) -> LogitTransform:
    """Return what the forward method of `model` does with the output of its head.

    model: on meta. backbone, head: paths of these modules. Raises ModelError if the method computes
    something else than a scale and a soft cap.
    """
    samples = [
        _TINY,
        _HUGE,
        *(sign * 2.0**exponent for exponent in range(-3, 8) for sign in (1, -1)),
    ]
    z = torch.tensor(samples, device="cpu")[None, :, None].expand(1, -1, _WIDTH).contiguous()
    identity = nn.Linear(_WIDTH, _WIDTH, bias=False, device="cpu")
    identity.weight = nn.Parameter(torch.eye(_WIDTH, device="cpu"), requires_grad=False)
    stub = StubBackbone(model.get_submodule(backbone), z)
    stubbed = with_module(with_module(model, backbone, stub), head, identity)
    ids = torch.zeros(1, len(samples), dtype=torch.long, device="cpu")
    try:
        with torch.no_grad():
            logits: Tensor = stubbed(input_ids=ids, use_cache=False).logits
        found = _fit(logits.float(), z)
    except Exception as error:  # Code of any model class runs here.
        fault = str(error).strip().splitlines() or [type(error).__name__]
        raise unsupported(
            model.config, f"the code around its head cannot be examined: {fault[0]}"
        ) from error
    if found is None:
        raise unsupported(
            model.config, "its logits are not the head's output times a scale, with a soft cap"
        )
    return found


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
