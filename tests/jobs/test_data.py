"""`qlora data`: what is shown is what is trained, and each finding is found."""

import json

import pytest

from qlora_cli.data.checks import EncodedDataset, examine
from qlora_cli.data.encode import Example
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError, ModelError
from qlora_cli.jobs.data import run
from qlora_cli.recipe.schema import Recipe
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data


def recipe(train, model="starter", **data):
    return Recipe.model_validate(
        {"model": {"name": str(model)}, "data": {"train": str(train), **data}}
    )


def patient(rows, tokenizer=None, **changed):
    settings = {
        "examples": [Example(ids, list(ids), f"rows.jsonl:{n}") for n, ids in enumerate(rows, 1)],
        "held_out": [],
        "format": "text",
        "tokenizer": tokenizer,
        "seq_len": 100,
        "packing": False,
        "num_sequences": len(rows),
    }
    return EncodedDataset(**{**settings, **changed})


def test_the_starter():
    result = run(recipe("starter:train", eval="starter:held_out", seq_len=256), show=2)
    assert result.format == "completion"
    assert 0 < result.trained_tokens < result.tokens
    assert result.sequences < result.rows
    assert [row.origin for row in result.shown] == ["train.jsonl:1", "train.jsonl:2"]
    shown = result.shown[0].tokens
    learnt = "".join(text for text, trained in shown if trained)
    assert learnt.startswith(("The", "There", "You", "Open"))
    assert learnt.endswith("<|im_end|>")
    assert not any("held-out" in finding or "data.eval" in finding for finding in result.findings)
    assert any("packing fills" in finding for finding in result.findings)
    json.dumps(result.to_dict())


@needs_shared_data
@pytest.mark.parametrize(
    "name", ["tokenizers/gpt2", "models/stories260K", "tokenizers/mistral_v3_hf"]
)
def test_shown_tokens_are_the_text(tmp_path, name):
    text = "Once, é 🙂 upon  a\ntime. " * 5
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": text}))
    result = run(recipe(rows, SHARED_DATA / name), show=1)
    tokenizer = load_tokenizer(str(SHARED_DATA / name))
    shown = "".join(piece for piece, _ in result.shown[0].tokens)
    shown = shown.removeprefix(tokenizer.bos_token).removesuffix(tokenizer.eos_token)
    assert shown.strip() == text.strip()
    assert result.trained_tokens == sum(trained for _, trained in result.shown[0].tokens)


@needs_shared_data
def test_rows_of_ids_without_a_tokenizer(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [2, 1, 0], "labels": [-100, 1, 0]}\n{"input_ids": [1, 1, 0]}')
    result = run(recipe(rows, SHARED_DATA / "models" / "gpt_nano_sort", seq_len=8), show=1)
    assert result.shown[0].tokens == (("2", False), ("1", True), ("0", True))
    assert (result.rows, result.tokens, result.trained_tokens) == (2, 6, 4)
    rows.write_text('{"input_ids": [2, 1, 3]}')
    with pytest.raises(DataError, match="the vocabulary ends at 2"):
        run(recipe(rows, SHARED_DATA / "models" / "gpt_nano_sort", seq_len=8), show=1)


def test_faulty_rows_fail(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        run(recipe(rows), show=1)


class FewTokens:
    """A tokenizer as the doctor sees one."""

    bos_token, bos_token_id = "<s>", 1
    eos_token_id = 2
    unk_token, unk_token_id = "<unk>", 3
    chat_template = "{{ strftime_now('%d') }}"

    def get_added_vocab(self):
        return {"<s>": 1, "</s>": 2}


FINDINGS = [
    (patient([[1, 1, 5, 2]], FewTokens()), "begin with <s> twice"),
    (patient([[1, 5, 6]], FewTokens()), "the last trained token is no special token"),
    (patient([[1, 3, 2]], FewTokens()), "1 tokens are unknown"),
    (patient([[1, 5, 2]], FewTokens(), format="messages"), "today's date"),
    (patient([[1, 5, 2]], FewTokens(), format="completion"), "has a chat template"),
    (patient([[1, 5, 2], [1, 6, 2], [1, 5, 2]]), "rows.jsonl:3 is rows.jsonl:1"),
    (patient([[1, 5, 2]], held_out=[Example([1, 5, 2], [1, 5, 2], "eval:7")]), "(eval:7)"),
    (patient([[1, 2], [1, 5, 2]]), "train one token only"),
    (patient([[*range(21)], *([n, n] for n in range(20, 26))]), "10 times as long as the median"),
    (patient([[*range(97)]]), "nearly fill data.seq_len=100"),
    (patient([[*range(50)]]), "data.seq_len=50 is enough"),
    (patient([[*range(50)]] * 2, packing=True, num_sequences=1), "to 100.0%"),
]


@pytest.mark.parametrize(("seen", "said"), FINDINGS, ids=[said for _, said in FINDINGS])
def test_each_finding_is_found(seen, said):
    assert any(said in finding for finding in examine(seen))


def test_sound_rows_have_no_findings():
    sound = patient([[1, *range(n, n + 92), 2] for n in (4, 5, 6)], FewTokens(), format="text")
    assert examine(sound) == ()


def test_no_end_token_is_a_finding():
    tokenizer = FewTokens()
    tokenizer.eos_token_id = None
    assert any("no end token" in finding for finding in examine(patient([[1, 5, 6]], tokenizer)))


@needs_shared_data
def test_a_folder_without_a_tokenizer_gives_none():
    assert load_tokenizer(str(SHARED_DATA / "models" / "gpt_nano_sort")) is None


@needs_shared_data
@pytest.mark.parametrize("content", ["{broken", "[]", '{"model": 3}', "{}"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    config = (SHARED_DATA / "models" / "stories260K" / "tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: damaged"):
        load_tokenizer(str(tmp_path))


@needs_shared_data
@pytest.mark.parametrize("part", ["model", "pre_tokenizer"])
def test_a_tokenizer_that_the_rust_library_refuses_is_a_model_error(tmp_path, part):
    content = json.loads((SHARED_DATA / "models" / "stories260K" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, part: {"type": "Unknown"}}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_folder_with_half_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
