"""Time and memory of the loss with several chunks (`train.loss_chunk`), on random tensors.

    python tools/benchmarks/bench_loss_chunk.py --out FILE.json [--rounds 5]

Each shape is a micro-batch and a head. One turn computes the loss and its gradients once with every
chunk, in alternating order; the ratio is taken within a turn, to the largest chunk. The memory is
the peak of what the storage tracker counts, without the inputs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from qlora_cli.memory.device import profile_of
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.nn.loss import chunked_cross_entropy

SHAPES = {
    "SmolLM2-135M, 256 tokens": (256, 576, 49152, torch.float32),
    "SmolLM2-135M, 256 tokens, head in 16 bit": (256, 576, 49152, torch.bfloat16),
}
"""Name -> (tokens, hidden size, vocabulary, dtype of the head). Hidden states are in float32."""
CHUNKS = (256, 128, 64, 32)
"""Tokens whose logits exist at once; only those up to the number of tokens are measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every shape and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    report = {
        "command": shlex.join(["python", "tools/benchmarks/bench_loss_chunk.py", *sys.argv[1:]]),
        "device": profile_of(device).name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "dtype": "float32",
        "rounds": options.rounds,
        "shapes": {name: measure(*shape, device, options.rounds) for name, shape in SHAPES.items()},
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["shapes"], indent=1))
    return 0


def measure(
    tokens: int,
    hidden: int,
    vocab_size: int,
    head_dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    """Return one entry per chunk: its memory, and quartiles of its time and of the ratio."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).to(device).requires_grad_()
    head = (0.02 * torch.randn(vocab_size, hidden, generator=generator)).to(device, head_dtype)
    targets = torch.randint(vocab_size, (tokens,), generator=generator).to(device)
    chunks = [chunk for chunk in CHUNKS if chunk <= tokens]
    seconds: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for turn in range(rounds + 1):
        for chunk in chunks if turn % 2 else reversed(chunks):
            began = time.perf_counter()
            _loss(states, head, targets, chunk)
            seconds[chunk].append(time.perf_counter() - began)
    entries = []
    for chunk in chunks:
        times = seconds[chunk][1:]  # The first turn warms up.
        ratios = [own / whole for own, whole in zip(times, seconds[chunks[0]][1:], strict=True)]
        entries.append(
            {
                "chunk": chunk,
                "peak_bytes": _peak_bytes(states, head, targets, chunk),
                "seconds_quartiles": quantiles(times, n=4),
                "ratio_quartiles": quantiles(ratios, n=4),
            }
        )
    return entries


def _loss(states: Tensor, head: Tensor, targets: Tensor, chunk: int) -> None:
    """Compute the loss and the gradient of the hidden states."""
    positions = torch.arange(len(targets), device=states.device)
    loss = chunked_cross_entropy(states, head, positions, targets, 1.0, chunk=chunk)
    loss.backward()
    states.grad = None
    if states.is_cuda:
        torch.cuda.synchronize()


def _peak_bytes(states: Tensor, head: Tensor, targets: Tensor, chunk: int) -> int:
    """Return the peak of the storages that the loss and its gradient create."""
    model = MemoryModel.of(profile_of(states.device))
    counter = model.new_counter()
    with model.new_tracker(counter, states.device.type) as tracker:
        tracker.tag([states, head, targets], "other")
        before = counter.live_bytes
        with counter.phase("step"):
            _loss(states, head, targets, chunk)
    return counter.phases[0].peak_bytes - before


if __name__ == "__main__":
    sys.exit(main())
