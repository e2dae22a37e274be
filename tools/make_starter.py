"""Make `qlora_cli/starter`: the embedded base, its tokenizer, its task and its model card.

    python tools/make_starter.py                       # the committed base, about half an hour on one core
    python tools/make_starter.py --steps 20 --out /tmp/starter

Reads the novels of the shared data (`starter_text.shared_folder`). With one seed and one number of
steps, on one machine with the same versions, every file comes out the same byte for byte, except the
line of the model card that says how long it took; that is why the length is given in steps and torch
is kept to one thread.
"""

import argparse
import json
import platform
import random
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from starter_card import write_card
from starter_task import make_task
from starter_text import CopyText, read_novels, shared_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BOS, EOS, PAD, TURN = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
SPECIAL = (BOS, EOS, PAD, TURN)  # ids 0 to 3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT, BATCH = 256, 8  # tokens a row, rows a step
LONG_SHARE = 0.1  # the last part of the run has rows of 2 x CONTEXT, half as many
COPY_SHARE = 0.25  # of the rows hold self-made text
EVAL_ROWS = 64
HERE = Path(__file__).resolve().parents[1]


def main() -> None:
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
    train(args, corpus, tokenizer, list(novels))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of text, weights and order")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved versions")
    parser.add_argument("--out", type=Path, default=HERE / "qlora_cli" / "starter")
    return parser.parse_args()


# Tokenizer and task ---------------------------------------------------------------------------


def train_tokenizer(text: str, copies: CopyText, seed: int) -> Tokenizer:
    """Byte-level BPE of 2048 pieces; puts the begin token before what it encodes, as Llama's does."""
    rng = random.Random(f"tokenizer-{seed}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
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
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, and the configuration through which `AutoTokenizer` finds the special tokens."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "extra_special_tokens": [TURN],
        "model_max_length": 2 * CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", config)


def save_task(out: Path, seed: int) -> None:
    """train.jsonl and held_out.jsonl."""
    train, held_out = make_task(seed, num_train=2000, num_held_out=180)
    for name, rows in (("train.jsonl", train), ("held_out.jsonl", held_out)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# Pretraining data ---------------------------------------------------------------------------


class Corpus:
    """Rows of token ids: stretches of the novels from random places, and packed self-made documents."""

    def __init__(self, tokenizer: Tokenizer, novels: dict, copies: CopyText, seed: int):
        self.tokenizer, self.copies = tokenizer, copies
        self.novels = self.encode(text for text, _ in novels.values())
        self.held_out = self.encode(text for _, text in novels.values())
        self.rng = random.Random(f"corpus-{seed}")
        self.held_out_characters = sum(len(text) for _, text in novels.values())

    def encode(self, texts) -> Tensor:
        """All texts as one line of ids, with an end token after each."""
        ids = []
        for text in texts:
            for line in self.tokenizer.encode_batch(text.splitlines(True), add_special_tokens=False):
                ids += line.ids
            ids.append(self.tokenizer.token_to_id(EOS))
        return torch.tensor(ids)

    def batch(self, rows: int, context: int) -> Tensor:
        """(rows, context + 1) ids; a share of the rows is self-made text."""
        return torch.stack(
            [
                self.copy_row(self.rng, context)
                if self.rng.random() < COPY_SHARE
                else novel_row(self.novels, self.rng.randrange(len(self.novels) - context), context)
                for _ in range(rows)
            ]
        )

    def copy_row(self, rng: random.Random, context: int) -> Tensor:
        """Documents one after the other, each with its begin and end token, cut at the row's end."""
        ids = []
        while len(ids) <= context:
            ids += self.tokenizer.encode(self.copies.document(rng) + EOS).ids
        return torch.tensor(ids[: context + 1])

    def eval_rows(self) -> dict[str, Tensor]:
        """{"novels", "copies"}: (EVAL_ROWS, CONTEXT + 1) each, never trained on."""
        rng = random.Random("held-out")  # a stream of its own, the same for every seed
        step = (len(self.held_out) - CONTEXT) // EVAL_ROWS
        novels = [novel_row(self.held_out, row * step, CONTEXT) for row in range(EVAL_ROWS)]
        copies = [self.copy_row(rng, CONTEXT) for _ in range(EVAL_ROWS)]
        return {"novels": torch.stack(novels), "copies": torch.stack(copies)}


def novel_row(ids: Tensor, start: int, context: int) -> Tensor:
    """The begin token and `context` ids from `start`."""
    return torch.cat([torch.tensor([SPECIAL.index(BOS)]), ids[start : start + context]])


# Model and optimizer ------------------------------------------------------------------------


def build_model() -> LlamaForCausalLM:
    """3.5 M parameters; every linear's sizes are multiples of the 64 weights that share an NF4 scale."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: for matrices (Jordan et al. 2024, "Muon").

    Learns about as much from a token as Adam does from one and a half, which on one core is what counts.
    torch.optim.Muon computes in bfloat16, which most CPUs do slowly; this one stays in float32.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T of `matrix` = U S V^T, by five quintic Newton-Schulz steps."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the tied embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def learning_rate(step: int, steps: int) -> float:
    """Factor: 20 steps up, level, then down to zero over the last 60 %."""
    return min((step + 1) / 20, 1.0, (steps - step) / (0.6 * steps))


# The run --------------------------------------------------------------------------------------


def train(args: argparse.Namespace, corpus: Corpus, tokenizer: Tokenizer, titles: list[str]) -> None:
    """Pretrain, and save model and card every `save_every` steps and at the end."""
    model, started, tokens = build_model(), time.monotonic(), 0
    optimizers = build_optimizers(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    for step in range(args.steps):
        long = 2 if step >= (1 - LONG_SHARE) * args.steps else 1
        rows = corpus.batch(BATCH // long, CONTEXT * long)
        loss = mean_loss(model, rows)
        loss.backward()
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        tokens += rows[:, 1:].numel()
        if step % 20 == 0:
            speed = tokens / (time.monotonic() - started)
            print(f"step {step}  loss {loss.item():.3f}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_model(model, args.out)
            facts = describe(args, model, corpus, titles, step + 1, tokens, time.monotonic() - started)
            facts |= measure(args.out, corpus, tokenizer)
            write_card(args.out / "MODEL_CARD.md", facts)
            print({key: facts[key] for key in ("novel_loss", "copy_loss", "task_loss")}, flush=True)


def mean_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross entropy of each next token in (rows, context + 1) ids, in nats."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """config.json, generation_config.json and float16 weights; refuses what float16 cannot hold."""
    half = build_model()
    half.load_state_dict(model.state_dict())
    half.to(torch.float16)
    for name, weight in half.named_parameters():
        if not weight.isfinite().all():
            raise SystemExit(f"{name} does not fit float16")
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


@torch.no_grad()
def measure(out: Path, corpus: Corpus, tokenizer: Tokenizer) -> dict:
    """Held-out losses of the weights as saved, computed in float32."""
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    rows = corpus.eval_rows()
    novels, copies = (mean_loss(model, rows[name]).item() for name in ("novels", "copies"))
    characters = corpus.held_out_characters / len(corpus.held_out)
    return {
        "novel_loss": novels,
        "novel_bits_per_character": novels / characters / 0.693147,
        "copy_loss": copies,
        "task_loss": task_loss(model, tokenizer, out),
        "folder_files": sorted(path.name for path in out.iterdir() if path.is_file()),
    }


def task_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> float:
    """Mean loss a token of the held-out completions and their end tokens, before any fine-tuning."""
    total, count = 0.0, 0
    for line in (out / "held_out.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(row["prompt"]).ids
        answer = tokenizer.encode(row["completion"] + EOS, add_special_tokens=False).ids
        ids = torch.tensor([prompt + answer])
        logits = model(ids[:, :-1], use_cache=False).logits[0, -len(answer) :]
        total += F.cross_entropy(logits, ids[0, -len(answer) :], reduction="sum").item()
        count += len(answer)
    return total / count


def describe(args, model, corpus, titles, steps, tokens, seconds) -> dict:
    """What the model card says of how the model was made."""
    return {
        "seed": args.seed,
        "steps": steps,
        "planned_steps": args.steps,
        "tokens": tokens,
        "seconds": seconds,
        "titles": titles,
        "novel_tokens": len(corpus.novels),
        "copy_share": COPY_SHARE,
        "rows": BATCH,
        "context": CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": model.config.to_dict(),
        "machine": f"{platform.machine()} CPU, one thread",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


if __name__ == "__main__":
    main()
