"""The model card of the embedded base, written from the facts of the run that made it."""

from pathlib import Path

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The embedded base of qlora

A causal language model of {parameters:,} parameters in the Llama architecture, small enough to lie inside
the package. It is there so that the quickstart and the tests fine-tune a real pretrained model without
a network. It writes English-looking text of the 19th century and copies from its context; it knows
nothing and should answer nobody.

| file | what |
|---|---|
| `model.safetensors`, `config.json`, `generation_config.json` | the weights in float16 and their configuration |
| `tokenizer.json`, `tokenizer_config.json` | byte-level BPE, {vocab_size:,} pieces, with a ChatML-like chat template |
| `train.jsonl`, `held_out.jsonl` | the task: {num_train:,} and {num_held_out} rows of `prompt` and `completion` |

All of it is made by `python tools/make_starter.py` from seed {seed}.

## Architecture

{num_hidden_layers} layers, hidden size {hidden_size}, {num_attention_heads} heads of {head_dim} with \
{num_key_value_heads} key/value heads, SwiGLU of {intermediate_size}, RMSNorm, rotary positions up to
{max_position_embeddings}, embedding and head tied.

## What it was trained on

- The novels below, in the public domain: published in {last_year} at the latest, the authors dead for more than
  70 years. {novel_tokens:,} tokens; the last {held_out_percent:.0f} % of each was held out. Read from a selection of the
  corpus `computationalstylistics/100_english_novels`; no text of theirs is in this package.
- Text made by `tools/starter_text.py` in which random common words, invented names and single sentences of the
  same novels come back, so that the model learns to copy: {copy_percent:.0f} % of the rows. Under the project's licence.

The task's rows (`tools/starter_task.py`: facts of an invented place, then a sentence) were not trained on.
They are made from word lists and a seed. No word of a held-out row's name occurs in a training row's
name, and no held-out combination of facts occurs in training. Under the project's licence.

{titles}.

## How

| | |
|---|---|
| steps, tokens | {steps:,} steps of {tokens_a_step:,} tokens: {tokens:,} |
| rows | {rows} of {context} tokens a step; in the last tenth {half_rows} of {long_context} |
| optimizer | Muon (0.02) for the layers' matrices, AdamW (0.004; 0.9, 0.95) for the embedding and norms, no weight decay |
| learning rate | 20 steps up, level, then linearly to zero over the last 60 % |
| precision | float32, saved as float16 |
| seed | {seed} |
| took | {minutes:.0f} minutes |
| on | {machine} |
| with | {versions} |

## Its loss

Mean cross entropy a token in nats, of the float16 weights computed in float32:

| held-out text | loss |
|---|---|
| ends of the novels, {eval_rows} rows of {context} tokens | {novel_loss:.3f} ({novel_bits_per_character:.2f} bits a character) |
| self-made copying text, {eval_rows} rows of {context} tokens | {copy_loss:.3f} |
| the task's {num_held_out} held-out completions, before any fine-tuning | {task_loss:.3f} |
"""


def write_card(path: Path, facts: dict) -> None:
    """Fill the card; a fact that is missing raises KeyError."""
    filled = {
        **facts["config"],
        **facts,
        "titles": "; ".join(facts["titles"]),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "held_out_percent": 100 * facts["held_out_share"],
        "copy_percent": 100 * facts["copy_share"],
        "tokens_a_step": facts["rows"] * facts["context"],
        "half_rows": facts["rows"] // 2,
        "long_context": facts["context"] * 2,
        "minutes": facts["seconds"] / 60,
    }
    path.write_text(CARD.format(**filled), encoding="utf-8")
