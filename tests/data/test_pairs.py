"""Preference rows: both answers, their boundary, and what is done with rows that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.data.collate import collate
from qlora_cli.data.conversation import PAIR
from qlora_cli.data.encode import Example, encode
from qlora_cli.data.encode_pairs import encode_pairs
from qlora_cli.data.examples import Examples
from qlora_cli.data.load import LoadedRows, ModelLimits, RowLoader
from qlora_cli.data.packing import BatchSchedule
from qlora_cli.data.row_errors import RowError
from qlora_cli.data.row_store import Row
from qlora_cli.errors import DataError, InputError, ModelError
from qlora_cli.jobs.data import run as show_data
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import Data, Recipe
from tests.helpers.encoding import examples_of
from tests.helpers.pairs import PAIRS, make_pair_rows
from tests.helpers.runs import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "is it"), ("assistant", "yes"), ("assistant", "no!"))
)


def chat_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encoded(fields: dict[str, Any], tokenizer: Any = None) -> Any:
    return encode_pairs([Row("a:1", fields)], "preference", tokenizer or chat_tokenizer())[0]


def texts(example: Example, tokenizer: Any = None) -> list[tuple[str, str]]:
    """Return the complete text and the trained text of each answer."""
    tokenizer = tokenizer or chat_tokenizer()
    return [
        (
            tokenizer.decode(part.ids),
            tokenizer.decode([label for label in part.labels if label != IGNORE_INDEX]),
        )
        for part in example.split()
    ]


def test_texts_are_encoded_like_prompt_and_completion() -> None:
    """Each answer equals the completion row of the same texts, end token included."""
    tokenizer = chat_tokenizer()
    pair = encoded({"prompt": "ab ", "chosen": "yes", "rejected": "no, never"})
    rows = [Row("a:1", {"prompt": "ab ", "completion": text}) for text in ("yes", "no, never")]
    assert pair.split() == encode(rows, "completion", tokenizer)
    assert pair.segments == (len(pair.split()[0].ids), len(pair.split()[1].ids))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "is it", "chosen": [YES], "rejected": [NO]},
        {"prompt": "is it", "chosen": [USER, YES], "rejected": [USER, NO]},
    ],
    ids=["prompt list", "prompt in both", "prompt text", "prompt twice"],
)
def test_messages_are_chats_of_the_template(fields: dict[str, Any]) -> None:
    assert texts(encoded(fields)) == [
        ("[user]is it</s>[assistant]yes</s>", "yes</s>"),
        ("[user]is it</s>[assistant]no!</s>", "no!</s>"),
    ]


def test_only_messages_after_the_common_ones_are_trained() -> None:
    """An earlier turn of the assistant is part of the prompt; two later ones are answers."""
    earlier = [USER, YES, {"role": "user", "content": "sure"}]
    pair = encoded({"chosen": [*earlier, YES], "rejected": [*earlier, NO]})
    assert [trained for _, trained in texts(pair)] == ["yes</s>", "no!</s>"]
    pair = encoded({"chosen": [USER, YES, USER, YES], "rejected": [USER, NO, USER, YES]})
    assert [trained for _, trained in texts(pair)] == ["yes</s>yes</s>", "no!</s>yes</s>"]


def test_equal_answers_are_trained_and_reported(tmp_path: Path) -> None:
    pair = encoded({"chosen": [USER, YES], "rejected": [USER, YES]})
    assert [trained for _, trained in texts(pair)] == ["yes</s>", "yes</s>"]
    rows = tmp_path / "rows.jsonl"
    fields = {"prompt": "Who?", "chosen": "I.", "rejected": "I."}
    rows.write_text(
        "".join(json.dumps(fields | change) + "\n" for change in ({}, {"chosen": "We"}))
    )
    result = show_data(starter_recipe(rows), show=0)
    (found,) = (finding for finding in result.findings if finding.code == "equal-answers")
    assert found.rows == 1
    assert found.first == ("rows.jsonl:1",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "no field 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": [NO]}, "must be a non-empty list of messages"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' must be a string"),
        ({"chosen": [USER], "rejected": [USER]}, "no assistant message"),
        ({"chosen": [USER, YES, USER], "rejected": [USER, YES, NO]}, "'chosen' has no assistant"),
        ({"prompt": "other", "chosen": [USER, YES], "rejected": [USER, NO]}, "is not a message of"),
    ],
)
def test_malformed_rows_are_refused(fields: dict[str, Any], message: str) -> None:
    error = encoded(fields)
    assert isinstance(error, RowError)
    assert message in str(error)


def test_messages_need_a_chat_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="preference rows need a chat template"):
        encoded({"chosen": [USER, YES], "rejected": [USER, NO]}, tokenizer)
    assert encoded({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer).num_targets == 4


def test_other_tasks_and_formats_are_refused() -> None:
    with pytest.raises(InputError, match="pairs of a chosen and a rejected answer"):
        encode([Row("a:1", {"prompt": "a", "chosen": "b", "rejected": "c"})], "preference", None)
    with pytest.raises(InputError, match="the rows are text rows"):
        encode_pairs([Row("a:1", {"text": "a"})], "text", None)


def test_an_example_counts_no_first_token_of_a_segment() -> None:
    pair = Example([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "a", (2, 3))
    assert pair.num_targets == 3 == sum(part.num_targets for part in pair.split())
    assert Example([1, 2, 3], [1, -100, 3], "a").num_targets == 1


def test_a_batch_restarts_at_each_answer() -> None:
    pair = Example([1, 2, 3, 4, 5], [-100, 2, 3, 4, 5], "a", (2, 3))
    batch = collate([pair, Example([6, 7], [-100, 7], "b")])
    assert batch.segments == (2, 3, 2)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    ignored = IGNORE_INDEX
    assert batch.labels.tolist() == [2, ignored, 4, 5, ignored, 7, ignored]
    assert batch.num_targets == int((batch.labels != ignored).sum()) == 4
    # Without its boundary the first answer's last token would predict the second answer's first.
    joined = collate([Example(pair.ids, pair.labels, "a")])
    assert joined.labels.tolist() == [2, 3, 4, 5, ignored]


def test_stored_rows_keep_their_segments() -> None:
    plain = Example([1, 2, 3], [1, 2, 3], "row:1")
    rows = [*PAIRS, plain]
    stored = examples_of(
        [Example(row.ids, row.labels, f"row:{i}", row.segments) for i, row in enumerate(rows)]
    )
    assert [row.split() for row in stored] == [
        [Example(p.ids, p.labels, f"row:{i}") for p in row.split()] for i, row in enumerate(rows)
    ]
    counts, longest = stored.segment_sizes()
    assert counts.tolist() == [2, 2, 2, 1]
    assert longest.tolist() == [14, 17, 5, 3]


@pytest.mark.parametrize("packing", [True, False])
def test_a_pair_stays_in_one_micro_batch(packing: bool) -> None:
    """The sizes of the schedule are those of its batches, and each pair is complete."""
    stored = examples_of(
        [Example(p.ids, p.labels, f"row:{i}", p.segments) for i, p in enumerate(PAIRS)]
    )
    for rows in (PAIRS, stored):
        settings = {"seq_len": 40, "packing": packing, "micro_batch": 1, "grad_accum": 2, "seed": 3}
        schedule = BatchSchedule(rows, **settings)  # type: ignore[arg-type]
        seen = []
        for step in range(schedule.steps_per_epoch):
            batches = schedule.step_batches(step)
            assert [batch.size for batch in batches] == schedule.sizes(step)
            for batch in batches:
                pairs = torch.tensor(batch.segments).view(-1, 2).tolist()
                seen += [tuple(pair) for pair in pairs]
        assert sorted(seen) == sorted(pair.segments for pair in PAIRS)


def loaded(rows: Path, positions: int | None = None, **data: Any) -> LoadedRows:
    settings = Data(train=str(rows), format="preference", **data)
    limits = ModelLimits(positions=positions)
    return RowLoader(settings, chat_tokenizer(), limits, encode_pairs).load().train


def test_long_pairs_are_dropped_as_a_whole(tmp_path: Path) -> None:
    """Both answers must fit in a sequence together, and each in the model's positions."""
    rows = make_pair_rows(tmp_path / "pairs.jsonl", num=4, length=8)
    lengths = loaded(rows).examples.lengths.tolist()
    limit = sorted(lengths)[-1] - 1
    kept = loaded(rows, seq_len=limit)
    assert kept.examples.lengths.tolist() == [n for n in lengths if n <= limit]
    assert kept.long_rows.dropped == sum(n > limit for n in lengths) > 0
    _, longest = loaded(rows).examples.segment_sizes()
    positions = int(max(longest)) - 1
    kept = loaded(rows, positions)
    assert len(kept.examples) == int((longest <= positions).sum()) < 4
    assert isinstance(kept.examples, Examples)
    # The sum of both answers may exceed the positions, because they do not attend to each other.
    assert max(kept.examples.lengths) > positions
    with pytest.raises(DataError, match="rows are longer than"):
        loaded(rows, seq_len=limit, long_rows="error")


@pytest.mark.parametrize("prompt", ["list", "text", "none"])
def test_a_system_prompt_is_in_both_answers(tmp_path: Path, prompt: str) -> None:
    rows = tmp_path / "rows.jsonl"
    fields = {
        "list": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        "text": {"prompt": "is it", "chosen": [YES], "rejected": [NO]},
        "none": {"chosen": [USER, YES], "rejected": [USER, NO]},
    }[prompt]
    rows.write_text(json.dumps(fields))
    (example,) = loaded(rows, system="be kind").examples
    for text, _ in texts(example):
        assert text.startswith("[system]be kind</s>[user]is it</s>[assistant]")
    with pytest.raises(InputError, match="have no system prompt"):
        loaded(make_pair_rows(tmp_path / "texts.jsonl"), system="be kind")


def starter_recipe(rows: Path, **sections: Any) -> Recipe:
    content = {"model": {"name": "starter"}, "task": "preference", "data": {"train": str(rows)}}
    return Recipe.model_validate(content | sections)


def test_data_shows_both_answers(tmp_path: Path) -> None:
    rows = make_pair_rows(tmp_path / "pairs.jsonl", num=3)
    result = show_data(starter_recipe(rows), show=2)
    assert [row.origin for row in result.shown] == [
        f"pairs.jsonl:{line} {name}" for line in (1, 2) for name in PAIR
    ]
    first = json.loads(rows.read_text().splitlines()[0])
    for row, name in zip(result.shown[:2], PAIR, strict=True):
        text = "".join(token for token, _ in row.tokens)
        assert first["prompt"] + first[name] in text
        assert "".join(token for token, trained in row.tokens if trained).endswith("<|im_end|>")
    assert result.rows == 3


def test_rows_of_other_formats_with_pairs_stay_what_they_were(tmp_path: Path) -> None:
    """Published pairs often have `messages` too; only `task: preference` reads the pair."""
    rows = tmp_path / "rows.jsonl"
    fields = {"messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, NO]}
    rows.write_text(json.dumps(fields))
    causal = Recipe.model_validate({"model": {"name": "starter"}, "data": {"train": str(rows)}})
    assert show_data(causal, show=0).format == "messages"
    assert show_data(starter_recipe(rows), show=0).format == "preference"
