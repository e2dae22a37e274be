"""Each check reports its finding, and sound rows have none."""

import pytest

from qlora_cli.data.checks import EncodedDataset, examine
from qlora_cli.data.encode import Example
from tests.helpers.encoding import examples_of


def dataset(rows, tokenizer=None, **changed):
    settings = {
        "examples": examples_of(
            [Example(ids, list(ids), f"rows.jsonl:{n}") for n, ids in enumerate(rows, 1)]
        ),
        "held_out": None,
        "format": "text",
        "tokenizer": tokenizer,
        "seq_len": 100,
        "packing": False,
        "num_sequences": len(rows),
    }
    return EncodedDataset(**{**settings, **changed})


class FewTokens:
    """The part of a tokenizer that the checks read."""

    bos_token, bos_token_id = "<s>", 1
    eos_token_id = 2
    unk_token, unk_token_id = "<unk>", 3
    chat_template = "{{ strftime_now('%d') }}"

    def get_added_vocab(self):
        return {"<s>": 1, "</s>": 2}


FINDINGS = [
    (dataset([[1, 1, 5, 2]], FewTokens()), "begin with <s> twice"),
    (dataset([[1, 5, 6]], FewTokens()), "the last trained token is not a special token"),
    (dataset([[1, 3, 2]], FewTokens()), "1 tokens are unknown"),
    (dataset([[1, 5, 2]], FewTokens(), format="messages"), "today's date"),
    (dataset([[1, 5, 2]], FewTokens(), format="completion"), "has a chat template"),
    (dataset([[1, 5, 2], [1, 6, 2], [1, 5, 2]]), "rows.jsonl:3 is equal to rows.jsonl:1"),
    (
        dataset([[1, 5, 2]], held_out=examples_of([Example([1, 5, 2], [1, 5, 2], "eval:7")])),
        "(eval:7)",
    ),
    (dataset([[1, 2], [1, 5, 2]]), "train one token only"),
    (dataset([[*range(21)], *([n, n] for n in range(20, 26))]), "10 times as long as the median"),
    (dataset([[*range(97)]]), "nearly fill data.seq_len=100"),
    (dataset([[*range(50)]]), "data.seq_len=50 is enough"),
    (dataset([[*range(50)]] * 2, packing=True, num_sequences=1), "to 100.0%"),
]


@pytest.mark.parametrize(("rows", "text"), FINDINGS, ids=[text for _, text in FINDINGS])
def test_each_check_reports_its_finding(rows, text):
    assert any(text in finding for finding in examine(rows))


def test_sound_rows_have_no_findings():
    sound = dataset([[1, *range(n, n + 92), 2] for n in (4, 5, 6)], FewTokens(), format="text")
    assert examine(sound) == ()


def test_no_end_token_is_a_finding():
    tokenizer = FewTokens()
    tokenizer.eos_token_id = None
    assert any("no end token" in finding for finding in examine(dataset([[1, 5, 6]], tokenizer)))
    tokenizer.chat_template = None
    alpaca = dataset([[1, 5, 6]], tokenizer, format="alpaca")
    assert any("no end token" in finding for finding in examine(alpaca))
