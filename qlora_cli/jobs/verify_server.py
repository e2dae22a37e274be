"""`qlora verify --server`: compare what a server answers with the merged folder."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_cli.adapters.peft_prefix import prefix_folder
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.serve.client import ServerClient
from qlora_cli.export.serve.rounding import Bits
from qlora_cli.export.serve.verification import verify_server
from qlora_cli.jobs.server_results import PredictionChange, ServerResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import return_freed_memory
from qlora_cli.runs.run import Run


def run(
    merged: Path, *, against: Path, url: str, name: str | None, bits: Bits, observer: Observer
) -> ServerResult:
    """Compare a server's answers with those of a merged model.

    merged: folder of the merged model. against: the run's folder. url: the server's address. name:
    the model's name on the server; None for the only one. bits: per weight, of the strongest
    quantization that is allowed.

    Raises InputError if a folder is missing or the server has no such model, QloraError if the
    server fails.
    """
    return_freed_memory()
    if prefix_folder(merged) is not None:
        raise UsageError(
            f"{merged} has a prefix (adapter.prefix), which a server does not use",
            where="--server",
            hint="omit --server",
        )
    client = ServerClient(url, name)
    device = torch.device(inspect_device().kind)
    report = verify_server(merged, Run(against), client, bits, device, observer)
    change = report.change
    return ServerResult(
        passed=not report.faults,
        server=client.url,
        model=report.model,
        texts=report.texts,
        same_texts=report.same_texts,
        chats=report.chats,
        same_chats=report.same_chats,
        mean_gap=change.mean_gap if change else None,
        mean_logprob_difference=change.mean_difference if change else None,
        rounding=tuple(
            PredictionChange(number, level.mean_gap, level.mean_difference)
            for number, level in report.rounding.items()
        ),
        faults=tuple(report.faults),
        explanation=tuple(report.explanation),
    )
