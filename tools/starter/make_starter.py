"""Make `qlora_cli/starter`: the embedded base, its tokenizer, its task and its model card.

    python tools/starter/make_starter.py           # the committed base: about 25 minutes on a core
    python tools/starter/make_starter.py --steps 20 --out tried

Reads the novels of the shared data (`starter_text.shared_folder`). With one seed and one number of
steps, on one machine with the same versions, every file comes out the same byte for byte, except
the model card's line on how long it took. That is why the length is given in steps and torch is
kept to one thread.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import torch
import transformers
from starter_card import write_card
from starter_model import build_model, build_optimizers, learning_rate
from starter_task import make_task
from starter_text import HELD_OUT_SHARE, LAST_YEAR, CopyText, read_novels, shared_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

SPECIAL = BOS, EOS, PAD, TURN = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"  # ids 0 to 3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STEP_TOKENS = 2048
STAGES = ((0.0, 128), (0.7, 256), (0.95, 512))  # from this part of the run: tokens a row
COPY_SHARES = (0.6, 0.2)  # of the rows hold self-made text: at the start, at the end
EVAL_ROWS, EVAL_CONTEXT = 64, 256
NUM_TRAIN, NUM_HELD_OUT = 2000, 180
STARTER = Path(__file__).resolve().parents[2] / "qlora_cli" / "starter"


def main() -> None:
    """Tokenizer, task, pretraining, model card."""
    args = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    novels = read_novels(shared_folder())
    text = "\n".join(kept for kept, _ in novels.values())
    copies = CopyText(text)
    tokenizer = train_tokenizer(text, copies, args.seed)
    save_tokenizer(tokenizer, args.out)
    save_task(args.out, args.seed)
    corpus = Corpus(tokenizer, novels, copies, args.seed)
    facts = train(corpus, args) | describe(corpus, list(novels), args)
    facts |= measure(corpus, args.out)
    write_card(args.out / "MODEL_CARD.md", facts)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1700, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of text, weights and order")
    parser.add_argument("--out", type=Path, default=STARTER)
    return parser.parse_args()


# Tokenizer and task ---------------------------------------------------------------------------


def train_tokenizer(text: str, copies: CopyText, seed: int) -> Tokenizer:
    """Byte-level BPE of 2048 pieces; like Llama's, it puts the begin token before a text."""
    rng = random.Random(f"tokenizer-{seed}")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made = [copies.document(rng) for _ in range(4000)]
    tokenizer.train_from_iterator([*text.split("\n"), *made], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and the configuration that names the special tokens."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "extra_special_tokens": [TURN],
        "model_max_length": STAGES[-1][1],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def save_task(out: Path, seed: int) -> None:
    """train.jsonl and held_out.jsonl."""
    train_rows, held_out = make_task(seed, NUM_TRAIN, NUM_HELD_OUT)
    for name, rows in (("train.jsonl", train_rows), ("held_out.jsonl", held_out)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# Pretraining ----------------------------------------------------------------------------------


class Corpus:
    """Rows of token ids: random stretches of the novels, and self-made documents, packed."""

    def __init__(self, tokenizer: Tokenizer, novels: dict, copies: CopyText, seed: int):
        self.tokenizer, self.copies = tokenizer, copies
        self.novels = self.encode(text for text, _ in novels.values())
        self.held_out = self.encode(text for _, text in novels.values())
        self.held_out_characters = sum(len(text) for _, text in novels.values())
        self.rng = random.Random(f"corpus-{seed}")

    def encode(self, texts: Iterable[str]) -> Tensor:
        """All texts as one line of ids, with an end token after each."""
        ids = []
        for text in texts:
            lines = text.splitlines(keepends=True)
            for line in self.tokenizer.encode_batch(lines, add_special_tokens=False):
                ids += line.ids
            ids.append(self.tokenizer.token_to_id(EOS))
        return torch.tensor(ids)

    def batch(self, done: float) -> Tensor:
        """(rows, context + 1) ids for the step at `done`, 0 to 1, of the run."""
        context = max(length for start, length in STAGES if done >= start)
        copy_share = COPY_SHARES[0] + done * (COPY_SHARES[1] - COPY_SHARES[0])
        rows = []
        for _ in range(STEP_TOKENS // context):
            if self.rng.random() < copy_share:
                rows.append(self.copy_row(self.rng, context))
            else:
                start = self.rng.randrange(len(self.novels) - context)
                rows.append(novel_row(self.novels, start, context))
        return torch.stack(rows)

    def copy_row(self, rng: random.Random, context: int) -> Tensor:
        """Documents one after the other between begin and end tokens, cut at the row's end."""
        ids = []
        while len(ids) <= context:
            ids += self.tokenizer.encode(self.copies.document(rng) + EOS).ids
        return torch.tensor(ids[: context + 1])

    def eval_rows(self) -> tuple[Tensor, Tensor]:
        """(novels, self-made text), each (EVAL_ROWS, EVAL_CONTEXT + 1), never trained on."""
        rng = random.Random("held-out")  # a stream of its own, the same for every seed
        stride = (len(self.held_out) - EVAL_CONTEXT) // EVAL_ROWS
        starts = range(0, EVAL_ROWS * stride, stride)
        novels = [novel_row(self.held_out, start, EVAL_CONTEXT) for start in starts]
        copies = [self.copy_row(rng, EVAL_CONTEXT) for _ in starts]
        return torch.stack(novels), torch.stack(copies)


def novel_row(ids: Tensor, start: int, context: int) -> Tensor:
    """The begin token and `context` ids from `start`."""
    return torch.cat([torch.tensor([SPECIAL.index(BOS)]), ids[start : start + context]])


def new_model() -> LlamaForCausalLM:
    """The model at its start, with this tokenizer's special ids."""
    return build_model(STAGES[-1][1], *(SPECIAL.index(token) for token in (BOS, EOS, PAD)))


def train(corpus: Corpus, args: argparse.Namespace) -> dict:
    """Pretrain and save; return {"parameters", "config", "seconds"}."""
    model, started = new_model(), time.monotonic()
    optimizers = build_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    for step in range(args.steps):
        loss = mean_loss(model, corpus.batch(step / args.steps))
        loss.backward()
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    save_model(model, args.out)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "config": model.config.to_dict(),
        "seconds": time.monotonic() - started,
    }


def mean_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross entropy of each next token in (rows, context + 1) ids, in nats."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """config.json, generation_config.json and float16 weights; refuses what float16 cannot hold."""
    model.to(torch.float16)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise SystemExit(f"{name} does not fit float16")
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by the owner alone


# Figures of the model card


@torch.no_grad()
def measure(corpus: Corpus, out: Path) -> dict:
    """Held-out losses of the weights as saved, computed in float32."""
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    novels, copies = (mean_loss(model, rows).item() for rows in corpus.eval_rows())
    bits_a_token = novels / torch.tensor(2.0).log().item()
    return {
        "novel_loss": novels,
        "novel_bits_per_character": bits_a_token
        * len(corpus.held_out)
        / corpus.held_out_characters,
        "copy_loss": copies,
        "task_loss": task_loss(model, corpus.tokenizer, out),
    }


def task_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> float:
    """Mean loss a token of the held-out completions with their end tokens: nothing fine-tuned."""
    total, count = 0.0, 0
    for line in (out / "held_out.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(row["prompt"]).ids
        answer = tokenizer.encode(row["completion"] + EOS, add_special_tokens=False).ids
        ids = torch.tensor([prompt + answer])
        logits = model(ids[:, :-1], use_cache=False).logits[0, -len(answer) :]
        total += cross_entropy(logits, ids[0, -len(answer) :], reduction="sum").item()
        count += len(answer)
    return total / count


def describe(corpus: Corpus, titles: list[str], args: argparse.Namespace) -> dict:
    """The settings of the run and what it ran on."""
    return {
        "seed": args.seed,
        "steps": args.steps,
        "step_tokens": STEP_TOKENS,
        "stages": STAGES,
        "copy_shares": COPY_SHARES,
        "titles": titles,
        "last_year": LAST_YEAR,
        "novel_tokens": len(corpus.novels),
        "held_out_share": HELD_OUT_SHARE,
        "eval_rows": EVAL_ROWS,
        "eval_context": EVAL_CONTEXT,
        "num_train": NUM_TRAIN,
        "num_held_out": NUM_HELD_OUT,
        "machine": f"{platform.machine()} CPU, one thread",
        "versions": {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


if __name__ == "__main__":
    main()
