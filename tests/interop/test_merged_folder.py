"""A merged folder contains what other programs read, with the names and types they expect.

llama.cpp's convert_hf_to_gguf.py takes the class of `architectures`, the sizes of config.json, the
tensors of `model*.safetensors` (and those must be the ones that the index names), and the tokenizer
from tokenizer.json and its neighbours; the `gguf` package has the tables and the tokenizer's reader
that it uses. transformers must load all of it without a warning.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import SpecialVocab, get_tensor_name_map
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_cli.events import Silent
from qlora_cli.export.gguf.model import ARCHITECTURES
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.runs.run import Run
from tests.helpers.runs import CPU, make_recipe, make_rows, make_run
from tests.helpers.vocabularies import byte_level_of, make_model_with_tokenizer

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIZES = (
    "num_hidden_layers",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
)
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def merge(
    folder: Path, family: str, dtype: torch.dtype = torch.float16, max_shard_bytes: int = 60_000
) -> Path:
    base = make_model_with_tokenizer(folder / "base", family, byte_level_of("gpt-2"))
    run, _ = make_run(folder / "run", make_recipe(base, make_rows(folder / "rows.jsonl")))
    tensors = open_merged_tensors(Run(run.path), "original", dtype, CPU)
    write_merged(tensors, base, folder / "out", {}, Silent(), max_shard_bytes)
    return folder / "out"


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_config_has_class_sizes_and_dtype(family: str, tmp_path: Path) -> None:
    folder = merge(tmp_path, family, torch.bfloat16)
    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == [CLASSES[family]]
    assert content["model_type"] == family
    assert content["dtype"] == "bfloat16"
    assert "quantization_config" not in content
    assert all(isinstance(content[key], int | float) for key in SIZES)
    assert content["rope_parameters"].keys() >= {"rope_type", "rope_theta"}
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_index_lists_every_tensor_once_and_converters_support_them(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = merge(tmp_path, family, dtype)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert all(name.startswith("model") for name in files)
    known = get_tensor_name_map(ARCHITECTURES[family], 2)
    found: dict[str, str] = {}
    for file in files:
        with safe_open(folder / file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                assert name not in found
                found[name] = file
                assert known.get_name(name, try_suffixes=(".weight", ".bias")) is not None
                assert tensors.get_slice(name).get_dtype() == DTYPES[dtype]
    assert found == index["weight_map"]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_reader_of_the_converter_finds_the_tokenizer(family: str, tmp_path: Path) -> None:
    folder = merge(tmp_path, family)
    own = byte_level_of("gpt-2")
    reader = SpecialVocab(folder, load_merges=True)
    definition = json.loads(own.backend_tokenizer.to_str())
    assert reader.merges == [" ".join(pair) for pair in definition["model"]["merges"]]
    assert reader.special_token_ids["bos"] == 1
    assert reader.special_token_ids["eos"] == 2
    assert reader.add_special_token["bos"] is True
    assert reader.chat_template == own.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("family", [*ARCHITECTURES, "gpt2"])
def test_transformers_loads_the_folder_without_a_warning(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = merge(tmp_path, family)
    loader: Any = AutoModelForCausalLM
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = GenerationConfig.from_pretrained(folder)
    assert [record.getMessage() for record in caplog.records] == []
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    assert model.dtype == torch.float16
    assert model.generation_config.top_k == settings.top_k == 7
    assert tokenizer.encode("a") == byte_level_of("gpt-2").encode("a")
