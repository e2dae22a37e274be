"""`qlora eval`: loss, perplexity and accuracy on held-out rows."""

from __future__ import annotations

import math

import torch

from qlora_cli.data.encode import encode
from qlora_cli.data.formats import detect_format, read_rows
from qlora_cli.data.packing import eval_batches
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.events import Observer
from qlora_cli.jobs.results import EvalResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.recipe.schema import Data
from qlora_cli.runs.open import OpenedModel, open_any
from qlora_cli.tasks.causal import CAUSAL


def run(where: str, *, data: str, observer: Observer) -> EvalResult:
    """Scores a run's folder or a model on every row of `data`, once.

    A run's own sequence length, packing and row format hold; for a plain model the row format is
    read off the rows, and a row may be as long as the model's positions. Raises InputError.
    """
    device = torch.device(inspect_device().kind)
    opened = open_any(where, device, observer)
    settings = _settings(opened)
    rows = read_rows(data)
    row_format = detect_format(rows, settings.format)
    tokenizer = load_tokenizer(str(opened.folder))
    vocab_size = opened.loaded.config.vocab_size
    examples = encode(rows, row_format, tokenizer, settings.seq_len, vocab_size=vocab_size)
    batches = eval_batches(
        examples, seq_len=settings.seq_len, packing=settings.packing, micro_batch=1
    )
    score = CAUSAL.evaluate(opened.loaded, batches, device)
    return EvalResult(score.loss, math.exp(min(score.loss, 700.0)), score.num_targets, score.metrics["accuracy"])


def _settings(opened: OpenedModel) -> Data:
    if opened.run is not None:
        return opened.run.recipe.data
    positions = getattr(opened.loaded.config, "max_position_embeddings", None) or Data(train="").seq_len
    return Data(train="", seq_len=max(8, positions), packing=False)
