"""Masks of chats: exactly the assistant's texts and their end of turn, or a clear error."""

import pytest

from qlora_cli.data.chat_template import ChatTemplate
from qlora_cli.data.formats import content_of
from qlora_cli.data.row_errors import RowError
from qlora_cli.data.row_store import Row
from qlora_cli.data.rows import read_rows
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError, ModelError
from qlora_cli.nn.labels import IGNORE_INDEX
from tests.helpers.encoding import encode
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data

TEMPLATES = sorted((SHARED_DATA / "chat_templates").glob("*/*.jinja"))

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [" What is 2 + 2? ", "And 3?\n"]
ANSWERS = ["It is 4.\n\nSure, it's é 🙂.", " Three is 3. "]
CHAT = [
    {"role": "user", "content": ASKED[0]},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": ASKED[1]},
    {"role": "assistant", "content": ANSWERS[1]},
]
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "weather", "arguments": {"city": "Rome"}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "name"}},
            "required": ["city"],
        },
    },
}
CALLING = [
    {"role": "user", "content": "Is it warm in Rome?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "31", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Yes, 31 degrees."},
]

# Name of a template's file -> end of an assistant's turn. The markers become special tokens.
CLOSINGS = {
    "alpaca": "</s>",
    "amberchat": "",
    "chatml": "<|im_end|>",
    "chatqa": "",
    "falcon-instruct": "",
    "gemma-it": "<end_of_turn>",
    "granite-3.0-instruct": "<|end_of_text|>",
    "llama-2-chat": " </s>",
    "llama-3-instruct": "<|eot_id|>",
    "mistral-instruct": "</s>",
    "openchat-3.5": "<|end_of_turn|>",
    "phi-3-small": "<|end|>",
    "phi-3": "<|end|>",
    "qwen2.5-instruct": "<|im_end|>",
    "saiga": "</s>",
    "solar-instruct": "",
    "vicuna": "</s>",
    "zephyr": "</s>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<\uff5cend▁of▁sentence\uff5c>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "<\uff5cend▁of▁sentence\uff5c>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "llama-cpp-deepseek-r1": "<\uff5cend▁of▁sentence\uff5c>",
    "meetkai-functionary-medium-v3.1": "<|eot_id|>",
    "meetkai-functionary-medium-v3.2": "<|eot_id|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.3-70B-Instruct": "<|eot_id|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "mistralai-Mistral-Nemo-Instruct-2407": "</s>",
}
# These read variables that a plain chat does not have.
REFUSE_PLAIN_CHATS = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "not iterable",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "not iterable",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "not iterable",
    "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",
}
REFUSE_SYSTEM = {
    "google-gemma-2-2b-it": "System role not supported",
    "mistralai-Mistral-Nemo-Instruct-2407": "leaves out or rewrites message 1",
}
BEGIN = {"meetkai-functionary-medium-v3.2": "all\n"}
BOS = {"CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_OF_TURN_TOKEN|>"}
MARKERS = [
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_turn|>", "<|end|>",
    "<|user|>", "<|assistant|>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|>", "<\uff5cend▁of▁sentence\uff5c>", "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
]  # fmt: skip


@pytest.fixture(scope="module")
def mistral():
    tokenizer = load_tokenizer(str(SHARED_DATA / "tokenizers" / "mistral_v3_hf"))
    tokenizer.add_special_tokens(
        {"extra_special_tokens": MARKERS}, replace_extra_special_tokens=False
    )
    return tokenizer


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(str(SHARED_DATA / "tokenizers" / "qwen_hf"))


def use(tokenizer, path, *, flat=True):
    """Set the tokenizer's template; those of one collection are used without their indentation."""
    source = path.read_text()
    if flat and path.parent.name == "chujiezheng":
        source = source.replace("    ", "").replace("\n", "")
    tokenizer.chat_template = source
    tokenizer.eos_token = BOS.get(path.stem, "</s>")
    return tokenizer


def encoded(tokenizer, messages, **fields):
    row = Row("rows.jsonl:1", {"messages": messages, **fields})
    return encode([row], "messages", tokenizer)[0]


def trained_texts(example, tokenizer):
    """Return the text of each run of trained tokens."""
    runs, inside = [], False
    for label in example.labels:
        if label != IGNORE_INDEX and not inside:
            runs.append([])
        inside = label != IGNORE_INDEX
        if inside:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


def same_text(trained, answer, path):
    """Compare without outer white space, and without inner if the template changes it."""
    if path.stem == "falcon-instruct":
        return trained.split() == answer.split()
    return trained.strip() == answer.strip()


@needs_shared_data
def test_every_template_is_expected_to_do_something():
    assert {path.stem for path in TEMPLATES} == CLOSINGS.keys() | REFUSE_PLAIN_CHATS.keys()


@needs_shared_data
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_masks_are_exactly_the_assistants_turns(mistral, path, system, flat):
    tokenizer = use(mistral, path, flat=flat)
    chat = [SYSTEM, *CHAT] if system else CHAT
    refused = {**REFUSE_PLAIN_CHATS, **(REFUSE_SYSTEM if system else {})}.get(path.stem)
    if refused:
        with pytest.raises(DataError, match=refused):
            encoded(tokenizer, chat)
        return
    example = encoded(tokenizer, chat)
    found = trained_texts(example, tokenizer)
    closing = CLOSINGS[path.stem].replace("▁", " ")  # as the tokenizer decodes it
    assert len(found) == len(ANSWERS)
    for text, answer in zip(found, ANSWERS, strict=True):
        begin = BEGIN.get(path.stem, "")
        assert text.startswith(begin)
        assert text.endswith(closing)
        trained = text.removesuffix(closing).removeprefix(begin)
        assert same_text(trained, answer, path)
    assert example.ids[:2] != [tokenizer.bos_token_id] * 2


@needs_shared_data
@pytest.mark.parametrize(
    "path",
    [path for path in TEMPLATES if path.stem not in REFUSE_PLAIN_CHATS],
    ids=lambda path: path.stem,
)
def test_a_row_is_what_the_template_writes(mistral, path):
    tokenizer = use(mistral, path)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert encoded(tokenizer, CHAT).ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", '{"name": "weather", "arguments": {"city": "Rome"}}'),
        ("meta-llama-Llama-3.1-8B-Instruct", '{"name": "weather", "parameters": {"city": "Rome"}}'),
        ("meetkai-functionary-medium-v3.1", '<function=weather>{"city": "Rome"}</function>'),
        ("mistralai-Mistral-Nemo-Instruct-2407", '"arguments": {"city": "Rome"}'),
    ],
)
def test_tool_calls_are_trained_as_json(mistral, name, called):
    path = next(path for path in TEMPLATES if path.stem == name)
    tokenizer = use(mistral, path)
    found = trained_texts(encoded(tokenizer, CALLING, tools=[TOOL]), tokenizer)
    assert len(found) == 2
    assert called in found[0]
    assert "31 degrees" in found[1]
    assert "31 degrees" not in found[0]


@needs_shared_data
def test_a_template_that_drops_tool_calls_is_refused(mistral):
    tokenizer = use(mistral, next(path for path in TEMPLATES if path.stem == "zephyr"))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['content'] or '')"
    )
    chat = [CALLING[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(DataError, match="rewrites or leaves out"):
        encoded(tokenizer, chat)


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 3."}


@pytest.mark.slow
@needs_shared_data
def test_thinking_is_trained_if_rendered_and_refused_if_dropped(qwen):
    qwen.chat_template = THINKS
    last = encoded(qwen, [*CHAT[:3], THOUGHT])
    expected = [ANSWERS[0] + "<|im_end|>", THOUGHT["content"] + "<|im_end|>"]
    assert trained_texts(last, qwen) == expected
    with pytest.raises(DataError, match=r"rewrites or leaves out message 2 \(assistant\)"):
        encoded(qwen, [CHAT[0], THOUGHT, *CHAT[2:]])


@needs_shared_data
def test_thinking_that_the_template_always_drops_is_refused(mistral):
    path = next(path for path in TEMPLATES if path.stem == "llama-cpp-deepseek-r1")
    with pytest.raises(DataError, match=r"rewrites or leaves out message 2 \(assistant\)"):
        encoded(use(mistral, path), [CHAT[0], THOUGHT])


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}BEHIND{% endgeneration %}INNER{% else %}{{ m.content }}"
    "{% endif %}OUTER\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@needs_shared_data
@pytest.mark.parametrize(
    ("inner", "behind"), [("<|im_end|>", ""), ("", "<|im_end|>"), ("<|im_end|>\n", "")]
)
def test_a_templates_own_marks_are_used_and_closed(qwen, inner, behind):
    source = GENERATION.replace("BEHIND", inner).replace("INNER", behind).replace("OUTER", "")
    qwen.chat_template = source
    found = trained_texts(encoded(qwen, CHAT), qwen)
    assert [text.rstrip("\n") for text in found] == [answer + "<|im_end|>" for answer in ANSWERS]


@needs_shared_data
def test_marks_around_the_wrong_text_are_refused(qwen):
    source = GENERATION.replace("{{ m.content }}BEHIND", "{{ m.content[:4] }}")
    qwen.chat_template = source.replace("INNER", "<|im_end|>").replace("OUTER", "")
    with pytest.raises(DataError, match="rewrites or leaves out"):
        encoded(qwen, CHAT)


@needs_shared_data
def test_turns_of_weight_0_are_not_trained(qwen):
    qwen.chat_template = THINKS
    chat = [*CHAT[:1], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    assert trained_texts(encoded(qwen, chat), qwen) == [ANSWERS[1] + "<|im_end|>"]


@needs_shared_data
@pytest.mark.parametrize(
    ("file", "format"),
    [
        ("openai_messages/toy_chat_fine_tuning.jsonl", "messages"),
        ("sharegpt_dummy/dummy_conversation.json", "sharegpt"),
        ("llamafactory/v1_sft_demo.jsonl", "messages"),
    ],
)
def test_exactly_the_answers_of_real_chats_are_trained(qwen, file, format):
    qwen.chat_template = THINKS
    rows = read_rows(str(SHARED_DATA / "instruct" / file), limit=200)
    key, role, text = {
        "messages": ("messages", "role", "content"),
        "sharegpt": ("conversations", "from", "value"),
    }[format]
    for row, example in zip(rows, encode(rows, format, qwen), strict=True):
        turns = [turn for turn in row.fields[key] if turn[role] in ("assistant", "gpt")]
        answers = [
            turn[text] if isinstance(turn[text], str) else turn[text][0]["value"] for turn in turns
        ]
        assert trained_texts(example, qwen) == [answer + "<|im_end|>" for answer in answers]


@needs_shared_data
def test_rows_that_break_the_templates_rules_are_named(mistral):
    """The toy file's 4th and 10th chats begin with the assistant."""
    tokenizer = use(mistral, next(path for path in TEMPLATES if path.stem == "chatml"))
    rows = read_rows(
        str(SHARED_DATA / "instruct" / "openai_messages" / "toy_chat_fine_tuning.jsonl")
    )
    with pytest.raises(DataError, match="roles must alternate") as caught:
        encode(rows, "messages", tokenizer)
    broken = [problem.where.partition(":")[2] for problem in caught.value.problems]
    assert broken == [
        str(number)
        for number, row in enumerate(rows, 1)
        if [turn["role"] for turn in row.fields["messages"]][:2] == ["system", "assistant"]
    ]


@needs_shared_data
def test_chats_without_a_chat_template_are_refused(mistral):
    mistral.chat_template = None
    with pytest.raises(ModelError, match="has none") as caught:
        encoded(mistral, CHAT)
    assert "data.template" in str(caught.value)


@needs_shared_data
@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_a_rendering_that_rows_share_gives_the_spans_of_each_row_alone(path, mistral, monkeypatch):
    """Real chats, with thinking and white space that some templates remove."""
    use(mistral, path)
    files = ("sharegpt_dummy/dummy_conversation.json", "llamafactory/v1_sft_demo.jsonl")
    parts = [read_rows(str(SHARED_DATA / "instruct" / file), 30) for file in files]
    rows = [row for part in parts for row in part]
    answer = {"role": "assistant", "content": "<think>Hm.</think>\n\nYes. "}
    chats = [CHAT, [SYSTEM, *CHAT], [CHAT[0], answer, CHAT[2], answer], [CHAT[0], answer]]
    rows += [Row(f"chats.jsonl:{n}", {"messages": chat}) for n, chat in enumerate(chats, 1)]

    def outcomes():
        template = ChatTemplate(mistral)
        for row in rows:
            name = "messages" if "messages" in row.fields else "sharegpt"
            content = content_of(row, name, has_chat_template=True)
            try:
                yield template.render(content)
            except RowError as error:
                yield str(error)

    shared = list(outcomes())
    monkeypatch.setattr(ChatTemplate, "_by_skeleton", lambda *_: None)
    assert shared == list(outcomes())
