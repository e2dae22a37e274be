"""The model card of the embedded base, written from the facts of the run that made it."""

from pathlib import Path

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The embedded base of qlora

A causal language model of {parameters:,} parameters in the Llama architecture, small enough to lie
inside the package. It is there so that the quickstart and the tests can fine-tune a really
pretrained model without a network. It writes text that looks like old English novels and can copy
from its context. It knows nothing: do not ask it anything.

- `model.safetensors`, `config.json`, `generation_config.json`: float16 weights, configuration
- `tokenizer.json`, `tokenizer_config.json`: byte-level BPE of {vocab_size:,} pieces with a
  ChatML-like chat template
- `train.jsonl`, `held_out.jsonl`: the task, {num_train:,} and {num_held_out} rows of `prompt` and
  `completion`

`python tools/starter/make_starter.py` makes all of it from seed {seed}.

## Architecture

{num_hidden_layers} layers, hidden size {hidden_size}, {num_attention_heads} query and \
{num_key_value_heads} key/value heads of {head_dim}, SwiGLU of {intermediate_size}, RMSNorm,
rotary positions up to {max_position_embeddings}, embedding and head tied.

## What it was trained on

- {num_novels} novels in the public domain, published in {last_year} at the latest:
  {novel_tokens:,} tokens. The last {held_out_percent:.0f} % of each is held out. They were read
  from the corpus `computationalstylistics/100_english_novels`; their text is not in this package.
- Text that `tools/starter/starter_text.py` makes, in which random common words, invented names and
  single sentences of the same novels come back, so that the model learns to copy.
  {copy_start:.0f} % of the rows at the start of the run, falling evenly to {copy_end:.0f} %.
  Apache-2.0.

The task (`tools/starter/starter_task.py`: facts of an invented place, then text that says them) was
not trained on. Its rows are made from word lists and a seed; Apache-2.0. No word of a held-out
row's name occurs in a training row's name, and no held-out combination of facts occurs in training.

The novels: {titles}.

## How

| | |
|---|---|
| length | {steps:,} steps of {step_tokens:,} tokens: {tokens:,} |
| tokens a row | {stages} |
| start | heads ready to copy ("mimetic initialization"): `tools/starter/starter_model.py` |
| optimizer, layers' matrices | Muon, learning rate 0.02, momentum 0.95 |
| optimizer, embedding and norms | AdamW, learning rate 0.002, betas 0.9 and 0.95 |
| learning rate | 20 steps up, level, then linearly to zero over the last 60 % |
| precision | trained in float32, saved as float16 |
| seed | {seed} |
| took | {minutes:.0f} minutes |
| on | {machine} |
| with | {versions} |

## Its loss

Mean cross entropy a token, in nats, of the float16 weights computed in float32:

| held-out text | loss |
|---|---|
| ends of the novels | {novel_loss:.3f} ({novel_bits_per_character:.2f} bits a character) |
| self-made text | {copy_loss:.3f} |
| the task's {num_held_out} completions, before fine-tuning | {task_loss:.3f} |

The first two on {eval_rows} rows of {eval_context} tokens.
"""


def write_card(path: Path, facts: dict) -> None:
    """Write the model card. facts: its figures. Raises KeyError if a figure is missing."""
    start, end = facts["copy_shares"]
    versions = facts["versions"].items()
    filled = {
        **facts["config"],
        **facts,
        "num_novels": len(facts["titles"]),
        "titles": "; ".join(facts["titles"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions),
        "held_out_percent": 100 * facts["held_out_share"],
        "copy_start": 100 * start,
        "copy_end": 100 * end,
        "tokens": facts["steps"] * facts["step_tokens"],
        "stages": ", ".join(f"{n} from {100 * at:.0f} % of the run" for at, n in facts["stages"]),
        "minutes": facts["seconds"] / 60,
    }
    path.write_text(CARD.format(**filled), encoding="utf-8")
