"""Prove every causal language model type of transformers and write the results.

    tools/validation/families.py [--composed] [--out FILE.json] [--page docs/models.md] [TYPE ...]

Each type is proved with the default config of its class, and a type whose default lacks what its
shipped models have also with their settings. The table of the types that pass is written between
the marks of the page. `--composed` proves the types of vision and text instead. No result is taken
from the cache. The column PEFT is measured here only: the package does not use PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft_law import LIMIT, peft_logits
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as COMPOSED_NAMES,
)
from transformers.utils import logging

from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.files.atomic import write_json
from qlora_cli.files.composed import language_config
from qlora_cli.models.build import skeleton
from qlora_cli.models.registry import FAMILIES
from qlora_cli.proof.prove import LAWS, ModelProof, proof_of
from qlora_cli.proof.small_config import small_config
from qlora_cli.proof.small_model import small_model
from qlora_cli.tasks.causal import CAUSAL

ROOT = Path(__file__).resolve().parents[2]
_WORDS = ("types", "more causal language model types of transformers pass, of")
_COMPOSED_WORDS = ("composed types", "types of vision and text of transformers pass, of")
"""The words of the marks of the page, and what its table contains."""
_COLUMNS = ("logits", "packing", "gradients", "quantized", "plan", "merge")


def _sections(*sizes: int) -> dict[str, Any]:
    """Return the rotary settings of a language model that has positions in time and space."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sizes)}
    return {"text_config": {"rope_parameters": rope}}


_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
    "output_gate_type": "sigmoid",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "big_bird": {"attention_type": "original_full"},
    "xmod": {"default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|visual token 000000|>": 151854}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "gemma4_text": {"num_kv_shared_layers": 18, "final_logit_softcapping": 30.0},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _sections(16, 24, 24)),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga"), _sections(8, 12, 12)),
    "paddleocr_vl": _sections(16, 24, 24),
}
"""Type -> settings of shipped models (granite-3.1, LFM2, Bamba, Gemma 4, Qwen2.5-VL, GLM-4V) that
the class's default config lacks: multipliers, a kind of layer, or sections of rotary positions."""


def config_of(model_type: str) -> Any:
    """Return the config that a type is proved with; that of a decoder if it can be one."""
    config = language_config(AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {})))
    if getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    return config


def prove(model_type: str) -> dict[str, Any]:
    """Return the proof of one type as JSON; an error if its config or small model has one."""
    try:
        config = config_of(model_type)
        proof = proof_of(config, CAUSAL, Silent())
        found: dict[str, Any] = {"proof": proof.to_dict(), "model_type": proof.model_type}
        if proof.failed is not None:
            return found
        packs = skeleton(small_config(config), torch.float32, CAUSAL.model_class)[1].rows.packs
        return found | {"packs": packs, "peft": _peft(config)}
    except Exception as error:  # Any class of transformers runs here.
        text = str(error).strip().splitlines()
        return {"model_type": model_type, "error": f"{type(error).__name__}: {text[0][:200]}"}


def _peft(config: Any) -> float | str:
    """Return the difference to PEFT's logits, or the error of PEFT."""
    with small_model(config, CAUSAL) as small:
        try:
            return peft_logits(small)
        except Exception as error:  # Code of PEFT and of any model class runs here.
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _peft_cell(value: float | str) -> str:
    """Return the difference, or that PEFT does not read the adapter."""
    if isinstance(value, str):
        return "not read"
    return f"{value:.0e}" if value <= LIMIT else f"differs: {value:.0e}"


def table(content: dict[str, Any], words: str) -> str:
    """Return the Markdown table of the types that pass, with how it was measured."""
    tried = {item["model_type"] for item in content["types"]}
    shipped = ", ".join(name for name in SETTINGS if name in tried)
    rows = []
    for item in content["types"]:
        proof = ModelProof.from_dict(item["proof"]) if "proof" in item else None
        if proof is not None and proof.failed is None:
            values = {result.law: result.value for result in proof.results}
            cells = " | ".join(f"{values[name]:.0e}" for name in _COLUMNS)
            together = "packed" if item["packs"] else "one at a time"
            cells = f"{cells} | {_peft_cell(item['peft'])} | {proof.seconds:.1f}"
            rows.append(f"| {proof.model_type} | {together} | {cells} |")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return "\n".join(
        [
            f"{len(rows)} {words}",
            f"{len(content['types'])} that were tried with the default config of their class",
            f"({shipped} with settings of shipped models)",
            f"(`{content['command']}`, {content['device']}, {versions}):",
            "",
            f"| type | rows | {' | '.join(_COLUMNS)} | PEFT | seconds |",
            "|" + "---|" * (len(_COLUMNS) + 4),
            *rows,
        ]
    )


def _write_page(page: Path, content: dict[str, Any], kind: str, words: str) -> None:
    """Write the table between the marks of a page. kind, words: see `_WORDS`."""
    begin, end = f"<!-- measured {kind} -->", f"<!-- end of measured {kind} -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{table(content, words)}\n{end}{after}")


def main() -> int:
    """Prove the types, write the file and the page, and print what does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--composed", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    tested = {name for family in FAMILIES for name in family.model_types}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[cache.SWITCH] = folder
        every = COMPOSED_NAMES if arguments.composed else CAUSAL_NAMES
        tried = [prove(name) for name in arguments.types or sorted(every) if name not in tested]
    # Some names of types have the config of another type, as gpt-sw3 has GPT-2's.
    types = [item for item in tried if item["model_type"] not in tested]
    name = "composed" if arguments.composed else "families"
    out = arguments.out or ROOT / f"tools/measurements/{name}.json"
    if arguments.types and out.is_file():
        new = {item["model_type"] for item in types}
        old = json.loads(out.read_text())["types"]
        types += [item for item in old if item["model_type"] not in new]
        types.sort(key=lambda item: item["model_type"])
    versions = next(item["proof"]["versions"] for item in types if "proof" in item)
    content = {
        "command": "python tools/validation/families.py"
        + " --composed" * arguments.composed
        + " TYPE ..." * bool(arguments.types),
        "device": f"CPU, {platform.machine()}, one thread",
        "versions": {"python": platform.python_version(), **versions},
        "limits": {law.name: law.limit for law in LAWS},
        "types": types,
    }
    write_json(out, content)
    if arguments.page is not None:
        _write_page(arguments.page, content, *(_COMPOSED_WORDS if arguments.composed else _WORDS))
    print(json.dumps([item for item in types if "error" in item], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
