"""A GGUF file contains the merged model, as two independent readers find it, value by value."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.errors import QloraError, UsageError, VerificationFailed
from qlora_cli.events import Silent
from qlora_cli.export.gguf.model import ARCHITECTURES
from qlora_cli.export.gguf.plan import GgufPlan
from qlora_cli.export.gguf.read_back import verify_gguf
from qlora_cli.export.gguf.write import export_gguf
from qlora_cli.export.options import GgufEncoding
from qlora_cli.models.registry import FAMILIES
from qlora_cli.runs.layout import RunFolder
from tests.helpers.cli_helpers import qlora
from tests.helpers.families import LLAMA3_ROPE_SCALING
from tests.helpers.observers import NoteRecorder
from tests.helpers.runs import make_base, make_recipe, make_rows, make_run
from tests.helpers.vocabularies import (
    NUM_TOKENS,
    PRE_TOKENIZERS,
    TEXT,
    byte_level,
    byte_level_of,
    make_model_with_tokenizer,
    sentencepiece,
    split,
)

pytestmark = pytest.mark.slow


def write(folder: Path, encoding: GgufEncoding = "f16") -> Path:
    return export_gguf(folder, encoding, Silent())


def field(file: Path, key: str) -> Any:
    found = GGUFReader(file).get_field(key)
    return None if found is None else found.contents()


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = load_file(folder / "model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in found.items()}


def test_every_model_type_is_supported_or_known_to_be_unsupported() -> None:
    known = {kind for family in FAMILIES for kind in family.model_types}
    assert known == {*ARCHITECTURES, "gpt2"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_values(family: str, tied: bool, tmp_path: Path) -> None:
    # transformers' reader assumes a head size of 128 for Qwen3 and ignores the file's value.
    sizes = {"head_dim": 128} if family == "qwen3" else {}
    folder = make_model_with_tokenizer(tmp_path / "model", family, tied=tied, **sizes)
    file = write(folder)
    reader: Any = AutoModelForCausalLM
    transformers_model = reader.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    ours = reader.from_pretrained(folder, dtype=torch.float32)
    found, wanted = transformers_model.state_dict(), ours.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    for key in ("rms_norm_eps", "num_key_value_heads", "hidden_size", "intermediate_size"):
        assert getattr(transformers_model.config, key) == pytest.approx(
            getattr(ours.config, key)
        ), key
    assert transformers_model.config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_rows_of_q_and_k_are_in_the_order_of_llama_cpp(family: str, tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", family)
    found = {tensor.name: tensor.data for tensor in GGUFReader(write(folder)).tensors}
    source = weights(folder)
    for linear, heads in (("q", 4), ("k", 2), ("v", 0)):
        wanted = source[f"model.layers.1.self_attn.{linear}_proj.weight"]
        if heads and family in ("llama", "mistral"):
            pairs = wanted.reshape(heads, 2, -1, wanted.shape[1])
            wanted = pairs.swapaxes(1, 2).reshape(wanted.shape)
        assert np.array_equal(found[f"blk.1.attn_{linear}.weight"], wanted.astype(np.float16))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_q8_0_values_are_within_half_a_step(family: str, tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", family)
    source = weights(folder)
    found = {tensor.name: tensor for tensor in GGUFReader(write(folder, "q8_0")).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "output.weight": "lm_head.weight",
    }
    for name, origin in names.items():
        tensor, values = found[name], source[origin]
        assert tensor.tensor_type == GGMLQuantizationType.Q8_0
        assert np.array_equal(tensor.data, quantize(values, GGMLQuantizationType.Q8_0))
        blocks = values.reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        error = np.abs(dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32) - blocks)
        # Half a step, plus the rounding of the step to float16: at most 2^-11 of it, 127 times.
        assert (error <= step * (0.5 + 127 * 2.0**-11)).all()
    norm = found["blk.0.attn_norm.weight"]
    assert norm.tensor_type == GGMLQuantizationType.F32
    assert np.array_equal(norm.data, source["model.layers.0.input_layernorm.weight"])


def test_biases_and_rows_that_are_no_multiple_of_a_block_are_written(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(
        tmp_path / "model", "llama", attention_bias=True, mlp_bias=True, intermediate_size=88
    )
    notes = NoteRecorder()
    file = export_gguf(folder, "q8_0", notes)
    found = {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}
    assert found["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert found["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0
    assert found["blk.0.attn_k.bias"] == GGMLQuantizationType.F32
    assert any("2 tensors are written in float16" in note for note in notes.notes)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama")
    file = write(folder)
    then = file.stat().st_mtime_ns
    assert write(folder) == file
    assert file.stat().st_mtime_ns == then, "the same file is not written again"
    (folder / ".model-F16.gguf.partial").write_text("mine")
    file.write_text("mine")
    with pytest.raises(UsageError, match="is not the GGUF file of this merged model"):
        write(folder)
    assert file.read_text() == "mine"
    file.unlink()
    write(folder)
    assert (folder / ".model-F16.gguf.partial").read_text() == "mine"


def test_sharded_bfloat16_is_read_and_rounded(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    found = {tensor.name: tensor.data for tensor in GGUFReader(write(folder)).tensors}
    wanted = model.model.layers[0].mlp.up_proj.weight.detach().half().numpy()
    assert np.array_equal(found["blk.0.ffn_up.weight"], wanted)


def test_llama3_frequencies_are_divided_by_the_documented_factors(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(
        tmp_path / "model", "llama", rope_parameters=LLAMA3_ROPE_SCALING
    )
    file = write(folder)
    (found,) = (t for t in GGUFReader(file).tensors if t.name == "rope_freqs.weight")
    wanted = []
    for pair in range(8):
        length = 2 * math.pi * 10000.0 ** (2 * pair / 16)
        smooth = (32 / length - 1.0) / (4.0 - 1.0)
        if length < 32 / 4.0:
            wanted.append(1.0)
        elif length > 32 / 1.0:
            wanted.append(8.0)
        else:
            wanted.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert 1.0 in wanted
    assert 8.0 in wanted
    assert len(set(wanted)) > 2
    assert found.data.tolist() == pytest.approx(wanted, rel=1e-6)


def test_linear_frequencies_and_a_sliding_window_are_metadata(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    folder = make_model_with_tokenizer(
        tmp_path / "model", "mistral", rope_parameters=rope, sliding_window=48
    )
    notes = NoteRecorder()
    file = export_gguf(folder, "f16", notes)
    assert field(file, "llama.rope.scaling.type") == "linear"
    assert field(file, "llama.rope.scaling.factor") == 4.0
    assert field(file, "llama.rope.freq_base") == 5000.0
    assert field(file, "llama.context_length") == 48
    assert any("architecture: the context is limited to 48 tokens" in note for note in notes.notes)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {}, "not gpt2"),
        ("llama", {"hidden_act": "gelu"}, "no gelu activation"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE_SCALING}, "'llama3' of qwen2"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "'yarn' of llama",
        ),
        ("qwen3", {"attention_bias": True}, "no biases"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_llama_cpp_does_not_support_is_refused(
    family: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", family, **settings)
    with pytest.raises(UsageError, match=message):
        write(folder)
    assert list(folder.glob("*.gguf")) == []


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_byte_level_tokenizer_is_written(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level_of(name)
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", tokenizer)
    file = write(folder)
    assert field(file, "tokenizer.ggml.model") == "gpt2"
    assert field(file, "tokenizer.ggml.pre") == name
    tokens, types = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == NUM_TOKENS
    wanted = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert tokens[: len(tokenizer)] == wanted
    assert types[:5] == [TokenType.CONTROL] * 5
    assert set(types[5 : len(tokenizer)]) == {TokenType.NORMAL}
    assert set(types[len(tokenizer) :]) == {TokenType.UNUSED}
    numbers = {key: field(file, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot")}
    assert numbers == {"bos": 1, "eos": 2, "eot": None}
    assert field(file, "tokenizer.ggml.add_bos_token") is True
    assert field(file, "tokenizer.ggml.add_eos_token") is False
    assert field(file, "tokenizer.chat_template") == tokenizer.chat_template
    read: Any = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    if name != "smollm":  # transformers' reader does not support this name
        assert [read.tokenize(text) for text in TEXT] == [tokenizer.tokenize(t) for t in TEXT]


def test_a_sentencepiece_tokenizer_is_written(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", tokenizer)
    file = write(folder)
    assert field(file, "tokenizer.ggml.model") == "llama"
    assert field(file, "tokenizer.ggml.add_space_prefix") is True
    tokens, scores = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.scores")
    types = dict(zip(tokens, field(file, "tokenizer.ggml.token_type"), strict=True))
    assert types["<unk>"] == TokenType.UNKNOWN
    assert types["<0x0A>"] == TokenType.BYTE
    assert types["</s>"] == TokenType.CONTROL
    # The merges have this order, so each token has a higher score than the next.
    merged = [scores[tokens.index(token)] for token in ("th", "he", "▁t", "the", "▁the", "ing")]
    assert merged == sorted(merged, reverse=True)
    assert len(set(merged)) == len(merged)


def test_every_token_that_ends_a_generation_is_written(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama")
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [2, 4, 3, 5]}))
    notes = NoteRecorder()
    file = export_gguf(folder, "f16", notes)
    assert field(file, "tokenizer.ggml.eot_token_id") == 4
    assert field(file, "tokenizer.ggml.eom_token_id") == 3
    assert any("tokens [5] also end a generation" in note for note in notes.notes)


def odd_tokenizers() -> dict[str, Any]:
    lower, prefixed, around = byte_level_of("gpt-2"), byte_level_of("gpt-2"), byte_level_of("gpt-2")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pair = around.backend_tokenizer.post_processor
    around.backend_tokenizer.post_processor = type(pair)(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 3)]
    )
    stripping = byte_level_of("gpt-2")
    stripping.add_special_tokens({"mask_token": _stripping()})
    endless = byte_level_of("gpt-2")
    endless.eos_token = None
    return {
        "normalizer": lower,
        "neither byte-level": prefixed,
        "other tokens to a text": around,
        "strips spaces": stripping,
        "no end-of-text": endless,
        "splits text into words": byte_level(split(r"\p{L}+|\s+|.")),
        "splits text into words ": byte_level(PRE_TOKENIZERS["llama-bpe"]),
        "merges are not in the order": sentencepiece(merges=[("t", "h"), ("h", "e")]),
        "changes texts": sentencepiece(prefix="_"),
    }


def _stripping() -> Any:
    from tokenizers import AddedToken

    return AddedToken("<mask>", lstrip=True, special=True)


@pytest.mark.parametrize(
    ("message", "tokenizer"), odd_tokenizers().items(), ids=lambda value: str(value)[:24]
)
def test_an_unsupported_tokenizer_is_refused(message: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", tokenizer)
    with pytest.raises(UsageError, match=message.strip()):
        write(folder)


def test_no_merges_and_no_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "model", "llama")
    with pytest.raises(UsageError, match="no merges"):
        write(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="no tokenizer"):
        write(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "model", "llama")
    byte_level_of("gpt-2").save_pretrained(folder)
    with pytest.raises(UsageError, match="the embedding has 259 rows"):
        write(folder)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_q.weight", "output_norm.weight"])
def test_a_flipped_bit_in_the_file_is_found(
    encoding: GgufEncoding, name: str, tmp_path: Path
) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama")
    file, plan = write(folder, encoding), GgufPlan(folder, encoding)
    verify_gguf(file, plan, Silent())
    (tensor,) = (tensor for tensor in GGUFReader(file).tensors if tensor.name == name)
    content = bytearray(file.read_bytes())
    content[tensor.data_offset + tensor.n_bytes // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(VerificationFailed, match=name) as caught:
        verify_gguf(file, plan, Silent())
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"The", b"Teh", "tokenizer.ggml.tokens is not"),
        (b"<|im_start|>{{", b"<|im_stort|>{{", "tokenizer.chat_template is not"),
        (b"blk.1.ffn_up", b"blk.1.ffn_pu", "blk.1.ffn_up.weight is missing"),
        (b"blk.1.ffn_up", b"blk.1.ffn_pu", "blk.1.ffn_pu.weight does not belong"),
        (b"GGUF", b"GGGF", "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_header_is_found(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama")
    file = write(folder)
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(VerificationFailed, match=message):
        verify_gguf(file, GgufPlan(folder, "f16"), Silent())


def test_a_file_that_was_cut_short_is_found(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama")
    file = write(folder)
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(VerificationFailed, match="cannot be read"):
        verify_gguf(file, GgufPlan(folder, "f16"), Silent())


def test_a_tensor_changed_after_writing_is_named(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama")
    file = write(folder, "q8_0")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"blk\.0\.ffn_up\.weight differs"):
        verify_gguf(file, GgufPlan(folder, "q8_0"), Silent())


@pytest.mark.parametrize(("encoding", "value"), [("f16", 1e5), ("q8_0", 1e8)])
def test_a_value_beyond_float16_is_an_error_and_leaves_nothing(
    encoding: GgufEncoding, value: float, tmp_path: Path
) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QloraError, match=r"blk\.1\.ffn_up\.weight has values that"):
        write(folder, encoding)
    assert [path.name for path in folder.iterdir() if "gguf" in path.name] == []


def finished_run(folder: Path, family: str) -> RunFolder:
    base = make_model_with_tokenizer(folder / "base", family)
    run, _ = make_run(folder / "run", make_recipe(base, make_rows(folder / "rows.jsonl")))
    return run


@pytest.mark.slow
def test_merge_writes_the_merged_model(tmp_path: Path) -> None:
    run, out = finished_run(tmp_path, "llama"), tmp_path / "out"
    words = ("merge", run.path, "--out", out, "--base", "original", "--gguf", "q8_0", "--json")
    outcome = qlora(*words)
    assert outcome.code == 0, outcome.err
    assert "model-Q8_0.gguf" in outcome.err
    verify_gguf(out / "model-Q8_0.gguf", GgufPlan(out, "q8_0"), Silent())
    outcome = qlora("verify", out, "--against", run.path)
    assert outcome.code == 0, outcome.err


def test_a_gguf_file_is_added_to_an_existing_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge was made without a GGUF file, or it was killed while the file was written."""
    run, out = finished_run(tmp_path, "llama"), tmp_path / "out"
    plain = ("merge", run.path, "--out", out, "--base", "original")
    assert qlora(*plain).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    outcome = qlora(*plain, "--gguf", "f16", "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["base"], outcome.json["tensors"]) == ("original", 21)
    verify_gguf(out / "model-F16.gguf", GgufPlan(out, "f16"), Silent())
    assert {name: (out / name).read_bytes() for name in before} == before
    for other in (("--dtype", "bfloat16"), ("--base", "dequantized"), ("--weight", "0.5")):
        outcome = qlora(*plain, "--gguf", "q8_0", *other)
        assert outcome.code == 2
        assert "is in use" in outcome.err


def test_another_family_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run, out = finished_run(tmp_path, "gpt2"), tmp_path / "out"
    outcome = qlora("merge", run.path, "--out", out, "--gguf", "f16")
    assert outcome.code == 2
    assert "--gguf" in outcome.err
    assert "not gpt2" in outcome.err
    assert not out.exists()


def test_without_the_package_merge_prints_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = finished_run(tmp_path, "llama"), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes `import gguf` fail
    outcome = qlora("merge", run.path, "--out", out, "--gguf", "f16")
    assert outcome.code == 2
    assert "pip install 'qlora-cli[gguf]'" in outcome.err
    assert not out.exists()


def test_without_llama_cpp_a_quantized_type_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = finished_run(tmp_path, "llama"), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # makes `import llama_cpp` fail
    outcome = qlora("merge", run.path, "--out", out, "--gguf", "q4_k_m")
    assert outcome.code == 2
    assert "--gguf q4_k_m needs llama-cpp-python" in outcome.err
    assert "pip install 'qlora-cli[llama]'" in outcome.err
    assert not out.exists()


def without_byte_token(unknown: str | None) -> Any:
    """Return a byte-level tokenizer that has no token for the byte 0xC0, like SmolLM2's."""
    tokenizer = byte_level_of("gpt-2")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    number = model["vocab"].pop("À")
    model["vocab"]["unusedword"] = number
    model["unk_token"] = unknown
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(definition))
    return tokenizer


def test_a_byte_without_a_token_is_noted(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", without_byte_token(None))
    notes = NoteRecorder()
    assert export_gguf(folder, "f16", notes).is_file()
    assert any("no token for 1 byte values" in note for note in notes.notes)


def test_a_byte_without_a_token_is_refused_if_there_is_an_unknown_token(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", without_byte_token("<unk>"))
    with pytest.raises(UsageError, match="lacks a token for some byte"):
        write(folder)
