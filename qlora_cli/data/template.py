"""Give a tokenizer the chat template of `data.template`, in training, generation and merging alike.

`data.template` is the name of a template in `TEMPLATES`, the path of a Jinja file, or the Jinja
text itself, which `run.json` stores in place of a path. The template replaces the tokenizer's own.
Each turn of a template in `TEMPLATES` ends with the tokenizer's end token, so that every program
that uses the model stops there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import InputError, ModelError
from qlora_cli.files.paths import user_path
from qlora_cli.recipe.schema import Data

TEMPLATE_FILE = "chat_template.jinja"
"""Name under which transformers saves and finds a tokenizer's chat template."""

_CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}END{{ '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_ALPACA = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{%- set system = 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.' -%}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{{ system + '\\n\\n' }}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '### Response:' + message['content'] }}END{{ '\\n\\n' if not loop.last else '' }}"
    "{%- else -%}"
    "{{ raise_exception('the template alpaca has no role ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:' }}{%- endif -%}"
)
TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML}
"""Name -> Jinja text, in which END is replaced by the end of a turn."""


def with_template(tokenizer: Any, data: Data) -> Any:
    """Return the tokenizer, with the chat template of `data.template` if that is set.

    tokenizer: it is changed; None if the base has none. Raises InputError if the template does not
    exist or is not valid, ModelError if there is no tokenizer.
    """
    if data.template is not None:
        if tokenizer is None:
            raise ModelError("data.template needs a tokenizer, and the base has none")
        tokenizer.chat_template = template_text(data.template, tokenizer)
    return tokenizer


def template_text(setting: str, tokenizer: Any) -> str:
    """Return the Jinja text of a value of `data.template` for a tokenizer.

    Raises InputError if it names no template, or the text is not valid Jinja.
    """
    if setting in TEMPLATES:
        return _begin(tokenizer) + TEMPLATES[setting].replace("END", _end(tokenizer))
    text = read_template(setting)
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except TemplateSyntaxError as error:
        place = "" if is_text(setting) else f"{setting}:{error.lineno}: "
        raise InputError(
            f"{place}not a valid Jinja template: {error.message}", where="data.template"
        ) from error
    return text


def read_template(setting: str) -> str:
    """Return a name or a text as it is, and the content of the file that a path names.

    Raises InputError if there is no such file.
    """
    if setting in TEMPLATES or is_text(setting):
        return setting
    try:
        return user_path(setting).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"no readable template {setting}",
            where="data.template",
            hint=f"name a Jinja file, or one of {', '.join(TEMPLATES)}",
        ) from error


def is_text(setting: str) -> bool:
    """Return whether a value of `data.template` is Jinja text, not a name or a path."""
    return "{{" in setting or "{%" in setting


def _begin(tokenizer: Any) -> str:
    """Return the Jinja text of the BOS token if the tokenizer adds one to a plain text."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return "{{ bos_token }}" if adds_bos else ""


def _end(tokenizer: Any) -> str:
    return "{{ eos_token }}" if tokenizer.eos_token else "{{ '<|im_end|>' }}"


def replaces_template(data: Data, base: Path, tokenizer: Any) -> bool:
    """Return whether `data.template` differs from the base's own chat template.

    base: the base's folder. tokenizer: its tokenizer with the chat template of `data`.
    """
    if data.template is None:
        return False
    own = load_tokenizer(str(base)).chat_template
    return bool(own) and own != tokenizer.chat_template


def trained_template(data: Data, base: Path) -> str | None:
    """Return the chat template that a merged model needs in place of the base's, None for its own.

    base: the base's folder.
    """
    if data.template is None:
        return None
    text: str = with_template(load_tokenizer(str(base)), data).chat_template
    return text
