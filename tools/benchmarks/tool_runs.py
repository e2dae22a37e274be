"""One comparison of compare_tools.py, its rows, and its runs in processes of their own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tool_process import IGNORED


@dataclass(frozen=True)
class Cell:
    """One comparison. checkpointing: of all tools, or ours: a number of recomputed blocks."""

    scenario: str
    bits: int
    tokens: int
    checkpointing: bool | int

    @property
    def name(self) -> str:
        """Return the settings for people."""
        if self.scenario == "defaults":
            return f"defaults, {self.bits} bit"
        recomputed = "blocks recomputed" if self.checkpointing else "blocks kept"
        return f"{self.scenario}, {self.bits} bit, {self.tokens} tokens, {recomputed}"


class Bench:
    """Runs tools in processes of their own."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self._options = options
        self._place = place
        self._tokenizer: Any = None

    def run(self, tool: str, cell: Cell) -> dict[str, Any]:
        """Return the figures of one run. Raises SystemExit if the tool fails."""
        spec = {
            "tool": tool,
            "model": str(self._options.model.resolve()),
            "rows": str(self._rows(cell)),
            "bits": cell.bits,
            "tokens": cell.tokens,
            "checkpointing": cell.checkpointing,
            "defaults": cell.scenario == "defaults",
            "dtype": self._options.dtype,
            "threads": self._options.threads,
            "skip": 0 if cell.scenario == "defaults" else self._options.skip,
            "out": str(self._place / "result.json"),
        }
        file = self._place / "spec.json"
        file.write_text(json.dumps(spec))
        script = Path(__file__).with_name("tool_process.py")
        surroundings = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "QLORA_CACHE": str(self._place / "cache"),
        }
        done = subprocess.run(
            [sys.executable, str(script), str(file)],
            env=surroundings,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{tool}, {cell.name}: {done.stderr[-2000:]}")
        return dict(json.loads((self._place / "result.json").read_text()))

    def _rows(self, cell: Cell) -> Path:
        """Return a file of rows with token ids and labels."""
        file = self._place / f"{cell.scenario}-{cell.tokens}.jsonl"
        if not file.exists():
            made = self._answers() if cell.scenario == "defaults" else self._full(cell.tokens)
            file.write_text("".join(json.dumps(row) + "\n" for row in made))
        return file

    def _source(self) -> list[dict[str, str]]:
        lines = self._options.rows.read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _full(self, tokens: int) -> list[dict[str, list[int]]]:
        """Return one row of exactly so many tokens for each step, from the texts of the rows."""
        count, ids = self._options.skip + self._options.steps, list[int]()
        for row in self._source():
            ids += self._tokenize(" ".join(row.values()))
            if len(ids) >= count * tokens:
                break
        parts = [ids[start : start + tokens] for start in range(0, count * tokens, tokens)]
        return [{"input_ids": part, "labels": part} for part in parts]

    def _answers(self) -> list[dict[str, list[int]]]:
        """Return chats of the first rows, of which the answers have labels."""
        made = []
        for row in self._source()[: self._options.num_rows]:
            question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
            chat = [{"role": "user", "content": question}]
            texts = [
                self.tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True
                ),
                f"{row['output']}<|im_end|>\n",
            ]
            prompt, answer = (self._tokenize(text) for text in texts)
            labels = [IGNORED] * len(prompt) + answer
            made.append({"input_ids": prompt + answer, "labels": labels})
        return made

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._options.model)
        return self._tokenizer

    def trained_tokens(self, cell: Cell) -> int:
        """Return the number of labels of all rows that are trained."""
        rows = (json.loads(line) for line in self._rows(cell).read_text().splitlines())
        return sum(label != IGNORED for row in rows for label in row["labels"])
