"""Prove every causal language model type of transformers and write the results.

    tools/validation/families.py [--out FILE.json] [--page docs/models.md] [TYPE ...]

Each type is proved with the default config of its class. The table of the types that pass is
written between the marks of the page. No result is taken from the cache.
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
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.files.atomic import write_json
from qlora_cli.models.registry import FAMILIES
from qlora_cli.proof.prove import LAWS, ModelProof, proof_of
from qlora_cli.tasks.causal import CAUSAL

ROOT = Path(__file__).resolve().parents[2]
_BEGIN, _END = "<!-- measured types -->", "<!-- end of measured types -->"
_COLUMNS = ("logits", "packing", "gradients", "quantized", "plan", "merge")


def prove(model_type: str) -> dict[str, Any]:
    """Return the proof of one type as JSON; an error if its config or small model has one."""
    try:
        return proof_of(AutoConfig.for_model(model_type), CAUSAL, Silent()).to_dict()
    except Exception as error:  # Any class of transformers runs here.
        text = str(error).strip().splitlines()
        return {"model_type": model_type, "error": f"{type(error).__name__}: {text[0][:200]}"}


def table(content: dict[str, Any]) -> str:
    """Return the Markdown table of the types that pass, with how it was measured."""
    proofs = [ModelProof.from_dict(item) for item in content["types"] if "results" in item]
    rows = []
    for proof in proofs:
        if proof.failed is None:
            values = {result.law: result.value for result in proof.results}
            cells = " | ".join(f"{values[name]:.0e}" for name in _COLUMNS)
            rows.append(f"| {proof.model_type} | {cells} | {proof.seconds:.1f} |")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return "\n".join(
        [
            f"{len(rows)} more causal language model types of transformers pass with the default",
            f"config of their class, of {len(content['types'])} that were tried",
            f"(`{content['command']}`, {content['device']}, {versions}):",
            "",
            f"| type | {' | '.join(_COLUMNS)} | seconds |",
            "|" + "---|" * (len(_COLUMNS) + 2),
            *rows,
        ]
    )


def main() -> int:
    """Prove the types, write the file and the page, and print what does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--out", type=Path, default=ROOT / "tools/measurements/families.json")
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tested = {name for family in FAMILIES for name in family.model_types}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[cache.SWITCH] = folder
        tried = [prove(name) for name in arguments.types if name not in tested]
    # Some names of types have the config of another type, as gpt-sw3 has GPT-2's.
    types = [item for item in tried if item["model_type"] not in tested]
    versions = next(item["versions"] for item in types if "versions" in item)
    content = {
        "command": "python tools/validation/families.py",
        "device": f"CPU, {platform.machine()}, one thread",
        "versions": {"python": platform.python_version(), **versions},
        "limits": {law.name: law.limit for law in LAWS},
        "types": types,
    }
    write_json(arguments.out, content)
    if arguments.page is not None:
        before, _, rest = arguments.page.read_text().partition(_BEGIN)
        _, _, after = rest.partition(_END)
        arguments.page.write_text(f"{before}{_BEGIN}\n{table(content)}\n{_END}{after}")
    print(json.dumps([item for item in types if "error" in item], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
