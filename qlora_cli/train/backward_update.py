"""Updates parameters within the backward pass, so that few gradients exist at once.

The parameters of a block are updated as soon as all their gradients exist, and the gradients are
freed (`train.update_in_backward`). A step then has the gradients of one block and not of all. Each
parameter gets the update that it gets after the backward pass, bit for bit: autograd gives it its
gradient only after every operation that uses it has run its backward pass.

Clipping needs the norm of all gradients before the first update, and several micro-batches need a
sum, so the recipe has neither. Source: the optimizer step in backward of torch's tutorials.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import scope
from qlora_cli.train.division import grouped_by_block
from qlora_cli.train.optimizer import TrainingOptimizer


class BackwardUpdates:
    """Context manager that updates each block in the backward pass of one step."""

    def __init__(
        self,
        trainable: dict[str, nn.Parameter],
        blocks: str,
        optimizer: TrainingOptimizer,
        lr: float,
    ) -> None:
        """trainable: name -> parameter. blocks: path of the list of blocks.

        optimizer: of these parameters. lr: learning rate of the step.
        """
        parameters = list(trainable.values())
        groups = [numbers for _, numbers in grouped_by_block(trainable, blocks)]
        self._group_of = {
            parameters[number]: index for index, group in enumerate(groups) for number in group
        }
        self._num_missing = [len(group) for group in groups]
        self._optimizer = optimizer
        self._lr = lr
        self._waiting: list[nn.Parameter] = []
        self._norms: list[Tensor] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def has_begun(self) -> bool:
        """Whether a parameter has been updated."""
        return bool(self._norms)

    def norm(self) -> Tensor:
        """Return the norm of all gradients of the step; 0 if there are none."""
        return torch.nn.utils.get_total_norm(self._norms)

    def __enter__(self) -> BackwardUpdates:
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._add) for parameter in self._group_of
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None:
            self._update()

    def _add(self, parameter: nn.Parameter) -> None:
        """Note that a parameter has its gradient, and update a group that is complete.

        A group without gradients for some of its parameters, such as those of an unused expert, is
        updated when the next group begins.
        """
        group = self._group_of[parameter]
        is_next = bool(self._waiting) and self._group_of[self._waiting[0]] != group
        self._waiting.append(parameter)
        self._num_missing[group] -= 1
        if is_next or not self._num_missing[group]:
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        """Update the parameters that have a gradient, and free it."""
        if not self._waiting:
            return
        with scope("temporary"):
            grads = [p.grad for p in self._waiting if p.grad is not None]
            self._norms.append(torch.nn.utils.get_total_norm(grads).float())
            del grads
        self._waiting.clear()
        self._optimizer.apply(1.0, self._lr)
        self._optimizer.zero_grad(set_to_none=True)
