"""The kinds of findings that the data checks report, each with its severity and its remedy.

To add one, add it to `_ALL` and yield it in `checks.CHECKS`, or in `text_checks.RowChecker`.
"""

from __future__ import annotations

from qlora_cli.data.finding_code import Code
from qlora_cli.data.text_codes import TEXT_CODES

_ALL = (
    Code(
        "unknown-role",
        "error",
        "a message has a role that neither chats nor the chat template define",
        "use the roles system, user, assistant and tool",
    ),
    Code(
        "labels-shifted",
        "error",
        "the labels are those of the next or the previous token",
        "write labels that are equal to input_ids, or -100; training shifts them itself",
    ),
    Code(
        "padded-rows",
        "error",
        "rows of input_ids end or begin with padding",
        "remove the padding; rows may differ in length",
    ),
    Code(
        "double-bos",
        "warning",
        "the row begins with the BOS token twice, once from the text and once from the template",
        "remove it from the text",
    ),
    Code(
        "bos-inside",
        "warning",
        "the BOS token occurs again inside the row",
        "remove it from the text; it is added once, at the beginning",
    ),
    Code(
        "no-end",
        "warning",
        "the last trained token is not a special token, so the model may not learn to stop",
        "use a chat template that ends each turn with a special token (data.template: chatml)",
    ),
    Code(
        "no-end-token",
        "warning",
        "the tokenizer has no end token, so the model does not learn where to stop",
        "set data.template, or name eos_token in the base's tokenizer_config.json",
    ),
    Code(
        "masked-end",
        "warning",
        "the end token at the end of the row is not trained, as if it were padding",
        "set its label to its id, not to -100",
    ),
    Code(
        "outside-template",
        "warning",
        "the tokenizer has a chat template, but the rows are plain prompts and completions",
        "write messages rows to train chats",
    ),
    Code(
        "template-replaced",
        "warning",
        "data.template differs from the chat template of the base, which it replaces",
        "remove data.template to train in the format that the base has learned",
    ),
    Code(
        "dated-template",
        "warning",
        "the chat template writes today's date into every row, so the rows differ on another day",
        "name a template without strftime_now with data.template",
    ),
    Code(
        "unknown-tokens",
        "warning",
        "the tokenizer does not know some of the text",
        "use a base with these characters, or remove them",
    ),
    Code(
        "special-token",
        "warning",
        "a text contains a special token of the tokenizer, which is read as a token",
        "remove it from the text; the template writes it",
    ),
    Code(
        "foreign-markup",
        "warning",
        "a text contains markup of another chat template, which is read as plain characters",
        "remove it, or write messages rows",
    ),
    Code(
        "rendered-chat",
        "warning",
        "a message contains a rendered prompt, so the row is in two chat formats",
        "split it into messages of user and assistant",
    ),
    Code(
        "assistant-first",
        "warning",
        "the chat begins with the assistant",
        "put the user's message in front of it",
    ),
    Code(
        "role-order",
        "warning",
        "two messages of the user or of the assistant follow each other",
        "join them, or add the message between them",
    ),
    Code(
        "ends-with-user",
        "warning",
        "the chat does not end with the assistant, so its end is not trained",
        "remove the last message, or add the answer",
    ),
    Code(
        "system-inside",
        "warning",
        "a system message is not the first message",
        "move it to the beginning of the chat",
    ),
    Code(
        "tool-without-call",
        "warning",
        "a tool's message follows no call of a tool",
        "add tool_calls to the assistant's message before it",
    ),
    Code(
        "undeclared-function",
        "warning",
        "the assistant calls a function that `tools` does not define",
        "add its definition to the row's tools",
    ),
    Code(
        "empty-prompt",
        "warning",
        "a prompt, an instruction or a message of the user is empty",
        "fill it, or remove the row",
    ),
    Code(
        "empty-answer",
        "warning",
        "an answer is empty or only white space, so the model learns to stop at once",
        "remove the row",
    ),
    Code(
        "prompt-space",
        "warning",
        "the prompt ends with a space, which most tokenizers join with the next word",
        "move the space to the beginning of the completion",
    ),
    Code(
        "joined-words",
        "warning",
        "prompt and completion are joined without white space between two words",
        "begin the completion with a space, or end the prompt with a line break",
    ),
    Code(
        "inside-token",
        "warning",
        "the completion begins inside a token, so the prompt alone has other tokens",
        "begin the completion with the white space, or end the prompt with a line break",
        share=0.1,
    ),
    Code(
        "answer-space",
        "warning",
        "the answer ends with white space, which is trained before the end token",
        "remove it",
        share=0.2,
    ),
    Code(
        "cut-answers",
        "warning",
        "many answers have one identical length and no end punctuation, as if they were cut",
        "use the complete answers",
    ),
    Code(
        "answer-in-prompt",
        "warning",
        "the prompt contains the complete answer",
        "remove it from the prompt, unless copying is the task",
        share=0.2,
    ),
    Code(
        "one-answer",
        "warning",
        "nearly all rows have the same answer",
        "check the column that is read as the answer",
    ),
    Code(
        "contradictions",
        "warning",
        "the same prompt has different short answers",
        "keep one answer per prompt",
    ),
    Code(
        "duplicates",
        "warning",
        "the row has the same tokens as an earlier row",
        "remove it, or set a weight to repeat rows on purpose",
    ),
    Code(
        "equal-answers",
        "warning",
        "both answers of the pair are the same, so no preference is learned",
        "remove the row",
    ),
    Code(
        "one-label",
        "error",
        "all rows have the same label, so nothing is learned from it",
        "check the column that is read as the label",
    ),
    Code(
        "label-conflict",
        "warning",
        "the text has another label in an earlier row",
        "keep one label per text",
    ),
    Code(
        "near-duplicates",
        "warning",
        "the row differs from an earlier one only in case, white space or punctuation",
        "keep one of them",
    ),
    Code(
        "similar-rows",
        "warning",
        "the row differs from an earlier one only in one word or number",
        "keep one of them, unless the difference is what is learned",
    ),
    Code(
        "held-out-similar",
        "warning",
        "the held-out row differs from a row of data.train only in one word or number",
        "remove it from data.train, or the held-out loss is too low",
    ),
    Code(
        "held-out-in-train",
        "warning",
        "the row of data.eval is also in data.train, so the held-out loss is too low",
        "remove it from data.train",
    ),
    Code(
        "held-out-prompts",
        "warning",
        "the prompt of the held-out row is also in data.train",
        "hold out all rows of a prompt, with a file of their own in data.eval",
    ),
    Code(
        "long-rows",
        "warning",
        "the row is more than 10 times as long as the median",
        "check that it is one row",
    ),
    *TEXT_CODES,
)
CODES: dict[str, Code] = {code.name: code for code in _ALL}
