"""A chat template of the recipe is used in training, generation and merged folders alike."""

import json

import pytest

from qlora_cli.data.formats import ALPACA
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.row_store import Row
from qlora_cli.data.template import TEMPLATES, template_text, trained_template, with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError, InputError, ModelError
from qlora_cli.files.locate import STARTER_FOLDER
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import Data
from tests.helpers.encoding import encode

CHAT = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_with(template):
    return with_template(load_tokenizer("starter"), Data(train="x", template=template))


def trained_texts(tokenizer, fields, format="messages"):
    """Return the text of the row and the trained part of it."""
    (row,) = encode([Row("rows.jsonl:1", fields)], format, tokenizer)
    trained = [label for label in row.labels if label != IGNORE_INDEX]
    return tokenizer.decode(row.ids), tokenizer.decode(trained)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_and_its_end_token_is_trained(name):
    tokenizer = tokenizer_with(name)
    end = tokenizer.eos_token
    text, trained = trained_texts(tokenizer, {"messages": CHAT})
    assert trained == f"Me.{end}So.{end}"
    assert text.count("Who?") == 1


def test_alpaca_writes_one_exchange_as_rows_without_a_template():
    with_chat, _ = trained_texts(tokenizer_with("alpaca"), {"messages": CHAT[:2]})
    plain = load_tokenizer("starter")
    plain.chat_template = None
    row = {"instruction": "Who?", "output": "Me."}
    without_chat, _ = trained_texts(plain, row, "alpaca")
    assert ALPACA.format_map(row) in with_chat
    assert with_chat == without_chat


def test_a_template_file_is_used_and_stored_as_text(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(NO_SYSTEM)
    assert tokenizer_with(str(path)).chat_template == NO_SYSTEM
    assert tokenizer_with(NO_SYSTEM).chat_template == NO_SYSTEM
    assert trained_template(Data(train="x", template=NO_SYSTEM), STARTER_FOLDER) == NO_SYSTEM
    assert trained_template(Data(train="x"), STARTER_FOLDER) is None


def test_a_template_that_cannot_be_used_is_refused(tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("{{ messages }}\n{% for %}")
    tokenizer = load_tokenizer("starter")
    with pytest.raises(InputError, match=r"broken\.jinja:2"):
        template_text(str(path), tokenizer)
    with pytest.raises(InputError, match="alpaca, chatml"):
        template_text("chatlm", tokenizer)
    with pytest.raises(ModelError, match="needs a tokenizer"):
        with_template(None, Data(train="x", template="chatml"))


def load(tmp_path, template, *rows, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = Data(train=str(path), template=template, **data)
    tokenizer = with_template(load_tokenizer("starter"), settings)
    loaded = RowLoader(settings, tokenizer, ModelLimits()).load()
    return [tokenizer.decode(row.ids) for row in loaded.train.examples], loaded.notes


ROWS = [
    {"messages": CHAT[:2]},
    {"messages": [{"role": "system", "content": "Be long."}, *CHAT[:2]]},
]


def test_the_system_prompt_is_added_to_rows_without_one(tmp_path):
    texts, notes = load(tmp_path, "chatml", *ROWS, system="Be short.")
    assert ["Be short." in text for text in texts] == [True, False]
    assert "Be long." in texts[1]
    assert texts[0].index("Be short.") < texts[0].index("Who?")
    assert notes == ()
    for row in (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
    ):
        assert "Be short." in load(tmp_path, "chatml", row, system="Be short.")[0][0]


def test_the_system_prompt_is_folded_if_the_template_has_none(tmp_path):
    texts, notes = load(tmp_path, NO_SYSTEM, ROWS[0], system="Be short.")
    assert "<user>Be short.\n\nWho?" in texts[0]
    assert "first user message" in notes[0]
    with pytest.raises(DataError, match="no system"):
        load(tmp_path, NO_SYSTEM, ROWS[1])


def test_a_system_prompt_for_rows_without_a_chat_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.system"):
        load(tmp_path, "chatml", {"text": "a"}, system="Be short.")


CALL = {"function": {"name": "add", "arguments": {"x": 1}}}
TOOL_CHAT = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
}


def test_tool_calls_that_the_template_does_not_write_are_one_error(tmp_path):
    with pytest.raises(DataError, match="does not write tool calls, which 5 of 6 rows") as caught:
        load(tmp_path, "chatml", *[TOOL_CHAT] * 5, ROWS[0])
    assert [problem.where for problem in caught.value.problems] == [
        f"rows.jsonl:{line}" for line in (1, 2, 3)
    ]
    assert "data.template" in str(caught.value)


def test_a_tool_definition_that_the_template_leaves_out_is_refused(tmp_path):
    row = {**ROWS[0], "tools": [{"type": "function", "function": {"name": "add"}}]}
    with pytest.raises(DataError, match="leaves out the tool 'add'"):
        load(tmp_path, "chatml", row)
