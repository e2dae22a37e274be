"""Which blocks keep what they need for the backward pass, and which compute it again.

A block that is kept saves the tensors that its backward pass needs, except the outputs of its norms
(`norm_outputs.py`). A block that is recomputed saves only its input, and runs its forward pass a
second time in the backward pass. Both give the same gradients, bit for bit, if the kernels are
deterministic.

The backward pass begins with the last block. Each kept block frees its tensors before the next
block runs, and a recomputed block needs space for its own tensors only while it runs. So the first
blocks are recomputed and the last ones are kept: then the first blocks use the space that the last
ones have freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_cli.nn.input_offload import InputOffload
from qlora_cli.nn.norm_outputs import NormOutputs
from qlora_cli.nn.spans import checkpoint_contexts

Action = Literal["keep", "recompute"]


@dataclass(frozen=True)
class ActivationPolicy:
    """What each block does with the tensors of its forward pass. actions: one per block."""

    actions: tuple[Action, ...]

    @classmethod
    def recompute_first(cls, number: int, num_blocks: int) -> ActivationPolicy:
        """Return the policy that recomputes the first `number` blocks and keeps the others."""
        assert 0 <= number <= num_blocks, (number, num_blocks)
        return cls(tuple("recompute" if n < number else "keep" for n in range(num_blocks)))

    @property
    def num_recomputed(self) -> int:
        """Return the number of blocks that are recomputed."""
        return self.actions.count("recompute")

    @property
    def num_kept(self) -> int:
        """Return the number of blocks that are kept."""
        return self.actions.count("keep")

    def next(self) -> ActivationPolicy | None:
        """Return the policy that keeps half of the blocks that this one keeps; None if none is."""
        if not self.num_kept:
            return None
        num_blocks = len(self.actions)
        return self.recompute_first(num_blocks - self.num_kept // 2, num_blocks)


class Recomputation:
    """Applies a policy to the blocks of a model.

    blocks: as many as the policy has. policy: may be replaced between two steps.
    preserves_random_state: whether the forward pass draws random numbers, which the second pass has
    to draw again; it costs time otherwise. offload: stores the inputs of recomputed blocks; None to
    keep them on the device.
    """

    def __init__(self, blocks: Iterable[nn.Module], policy: ActivationPolicy) -> None:
        self.policy = policy
        self.preserves_random_state = False
        self.before_block: Callable[[int], None] = lambda _: None
        """Called with the index of a block before each of its forward passes."""
        self.offload: InputOffload | None = None
        for index, block in enumerate(blocks):
            block.forward = self._forward_of(block, index)

    def _forward_of(self, block: nn.Module, index: int) -> Callable[..., Any]:
        """Return the forward method of a block under the policy."""
        # If the block referred to itself, only garbage collection would free it.
        reference, own_forward = weakref.ref(block), type(block).forward
        norm_outputs = NormOutputs(block)

        def forward(living: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.before_block(index)
            return own_forward(living, *args, **kwargs)

        def forward_by_policy(*args: Any, **kwargs: Any) -> Any:
            living = reference()
            assert living is not None
            if not (living.training and torch.is_grad_enabled()):
                return forward(living, *args, **kwargs)
            if self.policy.actions[index] == "keep":
                with norm_outputs.recomputed():
                    return forward(living, *args, **kwargs)
            with self.offload.storing() if self.offload is not None else nullcontext():
                return self._checkpointed(partial(own_forward, living, **kwargs), args, index)

        return forward_by_policy

    def _checkpointed(self, forward: Callable[..., Any], args: Sequence[Any], index: int) -> Any:
        """Run the forward pass of the block `index`, which is recomputed in the backward pass."""
        # Not inside the checkpoint: an exchange of gloo that begins there copies the hooks of the
        # thread, and with them keeps the input of the block until the exchange is waited for.
        self.before_block(index)
        passes = count()

        def run(*inputs: Any) -> Any:
            if next(passes):
                self.before_block(index)
            return forward(*inputs)

        return checkpoint(
            run,
            *args,
            use_reentrant=False,
            preserve_rng_state=self.preserves_random_state,
            determinism_check="none",
            context_fn=checkpoint_contexts,
        )
