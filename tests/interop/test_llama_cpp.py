"""llama.cpp reads the GGUF files, tokenizes as the tokenizer does and computes the same logits.

Runs where the package llama_cpp is installed (`pip install llama-cpp-python` compiles llama.cpp,
which takes some ten minutes), and is skipped elsewhere. test_gguf.py uses other readers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.errors import UsageError
from qlora_cli.events import Silent
from qlora_cli.export.gguf.model import ARCHITECTURES
from qlora_cli.export.gguf.write import export_gguf
from qlora_cli.export.options import GgufType
from tests.helpers.families import LLAMA3_ROPE_SCALING
from tests.helpers.vocabularies import (
    PRE_TOKENIZERS,
    TEXT,
    byte_level_of,
    make_model_with_tokenizer,
    sentencepiece,
)

llama_cpp = pytest.importorskip("llama_cpp")

DIFFICULT_TEXTS = [
    *TEXT,
    "<s>",
    " a",
    "a  b\n\n\n c",
    "1234567.89",
    "<|im_start|>the",
    "don't DON'T",
    "\t\t x",
]


def opened(file: Path) -> Any:
    """Open the model in llama.cpp, with the logits of every position."""
    return llama_cpp.Llama(
        str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, n_gpu_layers=0
    )


def distance(folder: Path, encoding: GgufType) -> float:
    """Return the root mean square difference of the logits, relative to that of the logits."""
    file = export_gguf(folder, encoding, Silent())
    ids = [1, 80, 91, 7, 33, 250, 64, 12, 300, 5, 17, 200, 201, 44, 45, 46, 47, 81, 90, 3, 2, 9, 10]
    model = opened(file)
    model.eval(ids)
    found = torch.tensor(np.array(model.scores[: len(ids)]))
    model.close()
    transformers_model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = transformers_model(torch.tensor([ids])).logits[0]
    return float((found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(("encoding", "allowed"), [("f16", 2e-3), ("q8_0", 3e-2)])
def test_logits_are_those_of_transformers(
    family: str, encoding: GgufType, allowed: float, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    folder = make_model_with_tokenizer(tmp_path / "model", family, spread=0.1, **sizes)
    assert distance(folder, encoding) < allowed


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": LLAMA3_ROPE_SCALING},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"tied": True},
        {"num_key_value_heads": 1},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers_for_every_setting_of_llama(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", spread=0.1, **settings)
    assert distance(folder, "f16") < 2e-3


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece"])
def test_texts_are_tokenized_as_by_the_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece() if name == "sentencepiece" else byte_level_of(name)
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", tokenizer)
    model = opened(export_gguf(folder, "f16", Silent()))
    own: Any = AutoTokenizer.from_pretrained(folder)
    found = [model.tokenize(text.encode(), add_bos=True, special=True) for text in DIFFICULT_TEXTS]
    model.close()
    assert found == [own.encode(text) for text in DIFFICULT_TEXTS]


@pytest.mark.parametrize(("kind", "allowed"), [("q6_k", 0.2), ("q5_k_m", 0.35), ("q4_k_m", 0.7)])
def test_a_quantized_file_is_written_and_computes_nearly_the_same(
    kind: GgufType, allowed: float, tmp_path: Path
) -> None:
    folder = make_model_with_tokenizer(
        tmp_path / "model", "llama", spread=0.1, hidden_size=256, intermediate_size=256
    )
    assert 0 < distance(folder, kind) < allowed
    assert [file.name for file in folder.glob("*gguf*")] == [f"model-{kind.upper()}.gguf"]
    assert export_gguf(folder, kind, Silent()).is_file()


def test_a_quantized_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama")
    export_gguf(folder, "q4_k_m", Silent())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="is not the GGUF file of this merged model"):
        export_gguf(folder, "q4_k_m", Silent())
