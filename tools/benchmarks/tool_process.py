"""One training run of one tool in this process, for compare_tools.py.

    python tools/benchmarks/tool_process.py SPEC.json

The specification and the result are JSON; the result is written to the specification's `out`. All
tools get the same rows of token ids and labels. `defaults` leaves every setting of the training
loop as the tool has it; otherwise they are equal.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tool_meter import Meter

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
IGNORED = -100


def run_ours(spec: Mapping[str, Any], meter: Meter) -> None:
    """Run `qlora train`'s job."""
    from qlora_cli.events import Silent, StepEvent
    from qlora_cli.jobs import train
    from qlora_cli.recipe.load import load_recipe

    class Marks(Silent):
        def stage(self, name: str, total: int) -> None:
            if name == "train" and not meter.marks:
                meter.begin()

        def step(self, event: StepEvent) -> None:
            meter.losses.append(event.loss)
            meter.mark()

    adapter = {"rank": RANK, "alpha": ALPHA, "targets": "all"}
    settings: dict[str, Any] = {
        "model": {"name": spec["model"]},
        "base": {"bits": spec["bits"]},
        "adapter": adapter,
        "data": {"train": spec["rows"]},
    }
    if not spec["defaults"]:
        settings["base"] |= {"compute_dtype": spec["dtype"]}
        settings["data"] |= {"seq_len": spec["tokens"], "packing": False}
        settings["train"] = {
            "micro_batch": 1,
            "grad_accum": 1,
            "lr": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0.0,
            "activation_checkpointing": spec["checkpointing"],
        }
    with tempfile.TemporaryDirectory() as place:
        recipe_file = Path(place) / "recipe.yaml"
        # JSON is YAML.
        recipe_file.write_text(json.dumps(settings | {"output": f"{place}/run"}))
        recipe = load_recipe(str(recipe_file), [])
        train.run(recipe, recipe_path=recipe_file, resume=False, observer=Marks())


def run_trainer(spec: Mapping[str, Any], meter: Meter) -> None:
    """Run transformers' Trainer on PEFT's model, as their documentation sets them up."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer = _model(spec)
    settings = _arguments(spec)
    if spec["bits"] != 16:
        # By default it turns checkpointing on.
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=spec["defaults"] or spec["checkpointing"]
        )
    elif settings.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    model = get_peft_model(model, _adapter())
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=_dataset(spec),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        callbacks=[_marks(meter)],
    )
    trainer.train()


def run_trl(spec: Mapping[str, Any], meter: Meter) -> None:
    """Run TRL's SFTTrainer, which makes PEFT's model itself."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = _model(spec)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_sft_arguments(spec)),
        train_dataset=_dataset(spec),
        processing_class=tokenizer,
        peft_config=_adapter(),
        callbacks=[_marks(meter)],
    )
    trainer.train()


def run_unsloth(spec: Mapping[str, Any], meter: Meter) -> None:
    """Run TRL's SFTTrainer on Unsloth's model, as its examples set them up. It needs a GPU."""
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel  # Before trl and transformers, which it changes.

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=spec["model"],
        max_seq_length=spec["tokens"] or 2048,
        load_in_4bit=spec["bits"] == 4,
        load_in_8bit=spec["bits"] == 8,
    )
    recomputes = "unsloth" if spec["defaults"] else spec["checkpointing"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[f"{name}_proj" for name in ["q", "k", "v", "o", "gate", "up", "down"]],
        use_gradient_checkpointing=recomputes,
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_sft_arguments(spec)),
        train_dataset=_dataset(spec),
        processing_class=tokenizer,
        callbacks=[_marks(meter)],
    )
    trainer.train()


TOOLS = {"ours": run_ours, "trainer": run_trainer, "trl": run_trl, "unsloth": run_unsloth}
PACKAGES = {"ours": (), "trainer": ("peft",), "trl": ("peft", "trl"), "unsloth": ("unsloth",)}
"""Tool -> what it needs beside the dependencies of this project."""


def _sft_arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of TRL's SFTTrainer. Its own dtype, bfloat16, is refused on a CPU."""
    import torch

    settings = _arguments(spec)
    if not torch.cuda.is_available():
        settings |= {"use_cpu": True, "bf16": False}
    if not spec["defaults"]:
        settings |= {"max_length": spec["tokens"], "bf16": spec["dtype"] == "bfloat16"}
    return settings


def _model(spec: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return transformers' model with a base of bitsandbytes, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = getattr(torch, spec["dtype"])
    quantization = {
        4: {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        8: {"load_in_8bit": True},
    }.get(spec["bits"])
    more = (
        {} if quantization is None else {"quantization_config": BitsAndBytesConfig(**quantization)}
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=dtype, device_map={"": device}, **more
    )
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def _adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", bias="none"
    )


def _dataset(spec: Mapping[str, Any]) -> Any:
    from datasets import Dataset

    lines = Path(spec["rows"]).read_text().splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def _arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a Trainer: those that write nothing, and equal ones."""
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    if spec["defaults"]:
        return settings | {"num_train_epochs": 1}
    return settings | {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": spec["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "bf16": spec["dtype"] == "bfloat16",
    }


def _marks(meter: Meter) -> Any:
    """Return a callback of a Trainer that marks the steps."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if not meter.marks:
                meter.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            meter.mark()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any
        ) -> None:
            if logs and "loss" in logs:
                meter.losses.append(float(logs["loss"]))

    return Marks()


def main(words: Sequence[str]) -> None:
    """Run what the specification says and write the figures."""
    import torch

    spec = json.loads(Path(words[0]).read_text())
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    meter = Meter(torch.cuda.is_available())
    TOOLS[spec["tool"]](spec, meter)
    result = meter.result(spec["skip"])
    assert meter.losses, "the tool reported no loss"
    assert all(map(math.isfinite, meter.losses)), meter.losses
    Path(spec["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
