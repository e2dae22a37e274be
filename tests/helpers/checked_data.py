"""Check rows as `qlora data` and `qlora train` do, with a small tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from qlora_cli.data.checks import examine
from qlora_cli.data.findings import Finding
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.jobs.data_findings import dataset_of
from qlora_cli.recipe.schema import Data
from tests.helpers.vocabularies import byte_level_of

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['tool_calls'] %}{% for c in m['tool_calls'] %}"
    "{{ '<tool_call>' + c['function'] | tojson + '</tool_call>' }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the BOS token <s>. chat: with a ChatML template."""
    made = byte_level_of("gpt-2")
    made.chat_template = CHATML if chat else None
    return made


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def findings_of(data: Data, made: Any, base: Path = Path()) -> tuple[Finding, ...]:
    """Return the findings about the rows of a recipe's section, for one tokenizer."""
    loaded = RowLoader(data, made, ModelLimits()).load()
    return examine(dataset_of(data, loaded, made, base))
