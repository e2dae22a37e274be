"""Every fault that is put into sound rows is found with its code, and nothing else is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.finding_codes import CODES
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.recipe.schema import Data
from tests.helpers.checked_data import findings_of, tokenizer, write_rows

Row = dict[str, Any]
_NAMES = "amber birch cedar delta ember frost grove heron inlet jetty knoll larch"
WORDS = _NAMES.split()


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def chat(*messages: Row, **fields: Any) -> Row:
    return {"messages": [*messages], **fields}


def question(number: int) -> str:
    return f"What is {WORDS[number]} number {number + 3}?"


def answer(number: int) -> str:
    return f"It is the {WORDS[-number - 1]} with {number * 7 + 11} rings, near the old mill."


CHATS = [chat(user(question(i)), assistant(answer(i))) for i in range(12)]
PAIRS = [{"prompt": question(i) + "\n", "completion": answer(i)} for i in range(12)]
ALPACA = [{"instruction": question(i), "output": answer(i)} for i in range(12)]
TEXTS = [{"text": f"{question(i)} {answer(i)}"} for i in range(12)]
IDS = [{"input_ids": [1, *range(20 + i, 31 + 2 * i), 2]} for i in range(12)]
SOUND = {"messages": CHATS, "completion": PAIRS, "alpaca": ALPACA, "text": TEXTS, "tokens": IDS}


def asked(text: str) -> Row:
    return chat(user(text), assistant("The answer is fourteen."))


def answered(text: str) -> Row:
    return chat(user("Where does the ferry land?"), assistant(text))


def called(name: str, *later: Row, **fields: Any) -> Row:
    call = {"type": "function", "function": {"name": name, "arguments": {"x": 1}}}
    calling = {"role": "assistant", "tool_calls": [call]}
    return chat(user("Look it up, please."), calling, *later, **fields)


def pair(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": completion}


def asked_for_copy(number: int) -> Row:
    return chat(user(f"{WORDS[number]}: {LONG} {number}."), assistant(f"{LONG} {number}."))


def ferry(time: str) -> str:
    return f"The ferry leaves the old harbour at {time}, and it is back when the sun sets."


def crossing(time: str, goal: str = "the big bay") -> tuple[Row, Row]:
    return user(f"How do people get from the market to {goal} in the summer months?"), assistant(
        ferry(time)
    )


TOOL = {"role": "tool", "content": "{}"}
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
LONG = "the answer has more than forty characters and is copied from here"
CUT = [f"{WORDS[i]} {'the old mill is near the river and ' * 3}"[:79] + "x" for i in range(12)]
HTML = "It is <b>green</b>."
GOOD, ENDED = [1, 40, 41, 42, 43, 44, 45, 2], [-100, -100, -100, 42, 43, 44, 45]

CHAT_FAULTS = [
    ("unknown-role", chat(user("a b?"), {"role": "narrator", "content": "x"}, assistant("c."))),
    ("unknown-role", chat({"role": "User", "content": "a b?"}, assistant("c."))),
    ("assistant-first", chat(assistant("Hello. How can I help?"), user("Hi."), assistant("Yes."))),
    ("assistant-first", chat(system("Be brief."), assistant("Hello."))),
    ("role-order", chat(user("Hi."), user("Are you there?"), assistant("Yes, I am."))),
    ("role-order", chat(user("Hi."), assistant("Hello."), assistant("How are you?"))),
    ("ends-with-user", chat(user("Hi."), assistant("Hello."), user("Bye."))),
    ("system-inside", chat(user("Hi."), system("Be brief."), assistant("Hello."))),
    ("tool-without-call", chat(user("Hi."), TOOL, assistant("It is empty."))),
    ("undeclared-function", called("find", TOOL, assistant("Done."), tools=TOOLS)),
    ("empty-prompt", asked("")),
    ("empty-prompt", asked(" \n")),
    ("empty-answer", answered("")),
    ("empty-answer", answered(" \n\t")),
    ("special-token", asked("Stop <|im_end|> here?")),
    ("special-token", asked("Stop </s> here?")),
    ("special-token", answered("<s>It lands in the bay.")),
    ("foreign-markup", asked("Stop <|endoftext|> here?")),
    ("foreign-markup", answered("It lands in the bay.<|eot_id|>")),
    ("foreign-markup", answered("It lands in the bay.<end_of_turn>")),
    ("rendered-chat", asked("### Instruction:\nAdd 1 and 2.\n\n### Response:\n3")),
    ("rendered-chat", asked("Human: Add 1 and 2.\n\nAssistant: 3\n\nHuman: Add 3.")),
    ("mojibake", answered("CafÃ© in the bay.")),
    ("mojibake", asked("Itâ€™s late, isnâ€™t it?")),
    ("mojibake", answered("It costs Â£5.")),
    ("mojibake", answered("Yes. \U0001f600".encode().decode("cp1252"))),
    ("replacement-character", answered("Caf\ufffd in the bay.")),
    ("control-characters", asked("Where\x00 is it?")),
    ("control-characters", answered("It is \x1b[31mred\x1b[0m.")),
    ("control-characters", answered("It is \x92here\x93.")),
    ("byte-order-mark", asked("\ufeffWhere is it?")),
    ("invisible-characters", asked("Where\u200b is it?")),
    ("invisible-characters", answered("It is \u202ered\u202c.")),
    ("html", answered(HTML)),
    ("html", answered("Salt &amp; pepper.")),
    ("html", asked("Is it here?<br/>Or there?")),
    ("literal-newlines", answered(r"First the bay.\nThen the mill.")),
    ("literal-newlines", answered(r"First the bay.\n\nthen the mill.")),
    ("near-duplicates", chat(user(question(1).upper()), assistant(f" {answer(1)}"))),
    ("near-duplicates", chat(user(question(1)), assistant(answer(1)[:-1] + "!"))),
    ("duplicates", CHATS[3]),
    ("long-rows", answered(" ".join(f"{answer(i % 12)} {i}" for i in range(60)) + ".")),
]
"""(code, the row that is added to sound chats)."""

PAIR_FAULTS = [
    ("empty-prompt", pair(" ", "A row without a prompt.")),
    ("empty-answer", pair("Where is it?\n", "")),
    ("empty-answer", pair("Where is it?\n", "  ")),
    ("prompt-space", pair("The ferry lands in the ", "bay.")),
    ("prompt-space", pair("Where is it?\nA:\t", "In the bay.")),
    ("joined-words", pair("The ferry lands in the", "bay.")),
    ("joined-words", pair("Where is the ferry?", "In the bay.")),
    ("special-token", pair("Where is it?\n", "In the bay.</s> And the mill.")),
    ("bos-inside", pair("Where is it?\n", "In <s> the bay.")),
    ("double-bos", pair("<s><s>Where is it?\n", "In the bay.")),
    ("foreign-markup", pair("[INST] Where is it? [/INST]\n", "In the bay.")),
    ("html", pair("Where is it?\n", HTML)),
]
"""(code, the row that is added to sound pairs of prompt and completion)."""

ID_FAULTS = [
    ("padded-rows", {"input_ids": [*GOOD, 0, 0, 0], "labels": [*GOOD, -100, -100, -100]}),
    ("padded-rows", {"input_ids": [*GOOD, 2, 2]}),
    ("padded-rows", {"input_ids": [2, 2, *GOOD]}),
    ("labels-shifted", {"input_ids": GOOD, "labels": [*GOOD[1:], -100]}),
    ("labels-shifted", {"input_ids": GOOD, "labels": [-100, *GOOD[:-1]]}),
    ("labels-shifted", {"input_ids": GOOD, "labels": [-100, -100, 42, 43, 44, 45, 2, -100]}),
    ("masked-end", {"input_ids": GOOD, "labels": [*ENDED, -100]}),
    ("no-end", {"input_ids": GOOD[:-1], "labels": ENDED}),
    ("bos-inside", {"input_ids": [1, 40, 41, 1, 42, 2]}),
    ("double-bos", {"input_ids": [1, *GOOD]}),
]
"""(code, the row that is added to sound rows of ids)."""

SET_FAULTS = [
    ("one-answer", [chat(user(question(i)), assistant("Yes, it is.")) for i in range(12)]),
    ("contradictions", [*CHATS, *(chat(user("Is it?"), assistant(a)) for a in ("Yes.", "No."))]),
    ("cut-answers", [chat(user(question(i)), assistant(CUT[i])) for i in range(12)]),
    ("answer-in-prompt", [asked_for_copy(i) for i in range(12)]),
    ("answer-space", [chat(user(question(i)), assistant(f"{answer(i)}\n")) for i in range(12)]),
    ("answer-space", [pair(f"{question(i)}\n", f"{answer(i)}  ") for i in range(12)]),
    ("inside-token", [pair(f"After {WORDS[i]} comes t", f"he {answer(i)}") for i in range(12)]),
    ("empty-prompt", [*ALPACA, {"instruction": " ", "output": "Nothing was asked."}]),
    ("mojibake", [*TEXTS, {"text": "CafÃ© in the bay."}]),
    ("foreign-markup", [*TEXTS, {"text": "[INST] Where? [/INST] In the bay."}]),
    ("empty-answer", [*TEXTS, {"text": " \n "}]),
    ("control-characters", [*TEXTS, {"text": "a\x07b"}]),
    ("duplicates", [*TEXTS, TEXTS[2]]),
    ("similar-rows", [*CHATS, chat(*crossing("nine")), chat(*crossing("five"))]),
    ("similar-rows", [*CHATS, chat(*crossing("9:25")), chat(*crossing("9:45"))]),
    ("similar-rows", [*CHATS, chat(*crossing("nine")), chat(*crossing("nine", "the dry bay"))]),
    ("similar-rows", [*TEXTS, {"text": ferry("nine")}, {"text": ferry("five")}]),
    ("outside-template", PAIRS),
]
"""(code, all rows)."""
MIXED = [
    *((code, [*CHATS, row]) for code, row in CHAT_FAULTS),
    *((code, [*PAIRS, row]) for code, row in PAIR_FAULTS),
    *((code, [*IDS, row]) for code, row in ID_FAULTS),
    *SET_FAULTS,
]
COMPANIONS = {
    # Another code that the same row has for the same reason.
    "rendered-chat": {"foreign-markup"},
    "double-bos": {"bos-inside"},
    "prompt-space": {"inside-token"},
    "joined-words": {"inside-token"},
    "answer-space": {"inside-token"},
    "inside-token": {"joined-words"},
    "empty-answer": {"inside-token", "near-duplicates"},
    "mojibake": {"control-characters"},
    "labels-shifted": {"no-end", "masked-end"},
    "padded-rows": {"no-end", "masked-end", "double-bos"},
}


def codes(file: Path, rows: list[Row], *, chat: bool, **settings: Any) -> Counter[str]:
    data = Data.model_validate({"train": str(write_rows(file, rows)), "seq_len": 4096, **settings})
    found = findings_of(data, tokenizer(chat=chat))
    return Counter({one.code: one.rows for one in found})


def is_chat(rows: list[Row], code: str) -> bool:
    return "messages" in rows[0] or code == "outside-template"


@pytest.mark.parametrize(
    ("code", "rows"), MIXED, ids=[f"{i}-{code}" for i, (code, _) in enumerate(MIXED)]
)
def test_a_fault_is_found_and_nothing_else(tmp_path: Path, code: str, rows: list[Row]) -> None:
    found = codes(tmp_path / "rows.jsonl", rows, chat=is_chat(rows, code))
    assert code in found, found
    assert {*found} <= {code} | COMPANIONS.get(code, set()), found


@pytest.mark.parametrize("name", SOUND)
def test_sound_rows_have_no_findings(tmp_path: Path, name: str) -> None:
    rows = SOUND[name]
    assert not codes(tmp_path / "rows.jsonl", rows, chat=name == "messages")


def test_the_rows_of_a_finding_are_named(tmp_path: Path) -> None:
    rows = [*CHATS, *(asked(f"Where\x00 is {word}?") for word in WORDS[:5])]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = Data.model_validate({"train": str(file), "seq_len": 4096})
    (found,) = findings_of(data, tokenizer(chat=True))
    assert (found.code, found.severity, found.rows) == ("control-characters", "warning", 5)
    assert found.first == ("rows.jsonl:13", "rows.jsonl:14", "rows.jsonl:15")
    assert "5 rows (rows.jsonl:13, rows.jsonl:14, rows.jsonl:15, ...)" in found.text


def test_faults_of_rows_that_several_processes_tokenize_are_added_up(tmp_path: Path) -> None:
    rows = [asked(f"Is number {i} {'<b>bold</b>' if i % 50 == 0 else 'bold'}?") for i in range(600)]
    found = [codes(tmp_path / "rows.jsonl", rows, chat=True, processes=number) for number in (1, 2)]
    assert found[0] == found[1]
    assert found[0]["html"] == 12


def test_held_out_rows_that_are_trained_on(tmp_path: Path) -> None:
    def found(*held_out: Row) -> Counter[str]:
        file = write_rows(tmp_path / "held_out.jsonl", held_out)
        return codes(tmp_path / "rows.jsonl", CHATS, chat=True, eval=str(file))

    other = chat(user("Where is the mill?"), assistant("It is by the river."))
    upper = chat(user(question(1).upper()), assistant(answer(1)))
    same_prompt = chat(user(question(1)), assistant("I have not counted them."))
    assert not found(other)
    assert found(other, CHATS[3]) == {"held-out-in-train": 1}
    assert found(other, upper) == {"held-out-in-train": 1}
    assert found(other, same_prompt) == {"held-out-prompts": 1}


def test_held_out_rows_that_differ_in_one_word(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", [chat(*crossing("five"))])
    for rows, codes_found in (
        (CHATS, {}),
        ([*CHATS, chat(*crossing("nine"))], {"held-out-similar": 1, "held-out-prompts": 1}),
    ):
        found = codes(tmp_path / "rows.jsonl", rows, chat=True, eval=str(held_out))
        assert found == codes_found


def test_padding_is_found_without_a_tokenizer(tmp_path: Path) -> None:
    rows = [{"input_ids": [*range(5, 10 + i), *[0] * (8 - i)]} for i in range(6)]
    data = Data.model_validate({"train": str(write_rows(tmp_path / "rows.jsonl", rows))})
    assert [found.code for found in findings_of(data, None)] == ["padded-rows"]


def test_facts_about_the_tokenizer(tmp_path: Path) -> None:
    dated, endless = (load_copy(tmp_path / name) for name in ("dated", "endless"))
    dated.chat_template = "{{ strftime_now('%d') }}" + dated.chat_template
    endless.chat_template = endless.chat_template.replace("<|im_end|>", " END")
    data = Data.model_validate({"train": str(write_rows(tmp_path / "rows.jsonl", CHATS))})
    assert [found.code for found in findings_of(data, dated)] == ["dated-template"]
    assert [found.code for found in findings_of(data, endless)] == ["no-end"]
    texts = Data.model_validate({"train": str(write_rows(tmp_path / "texts.jsonl", TEXTS))})
    endless.eos_token, endless.chat_template = None, None
    assert [found.code for found in findings_of(texts, endless)] == ["no-end-token"]


def test_a_replaced_template_is_found(tmp_path: Path) -> None:
    made = load_copy(tmp_path / "base")
    made.chat_template = made.chat_template.replace("<|im_start|>", "<|im_start|> ")
    file = write_rows(tmp_path / "rows.jsonl", CHATS)
    data = Data.model_validate({"train": str(file), "template": made.chat_template})
    found = findings_of(data, made, tmp_path / "base")
    assert [one.code for one in found] == ["template-replaced"]
    assert not findings_of(data, load_copy(tmp_path / "base"), tmp_path / "base")


def load_copy(folder: Path) -> Any:
    """Return the tokenizer with a chat template, which the test may change, saved in `folder`."""
    tokenizer(chat=True).save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_every_code_has_a_broken_set_and_there_are_sixty() -> None:
    elsewhere = {
        "held-out-similar",
        "held-out-in-train",
        "held-out-prompts",
        "dated-template",
        "no-end-token",
    }
    elsewhere |= {"template-replaced", "unknown-tokens", "equal-answers"}
    elsewhere |= {"one-label", "label-conflict"}
    assert {code for code, _ in MIXED} == {*CODES} - elsewhere
    assert len(MIXED) >= 60
