"""Measure what each type of GGUF file costs: KL divergence, top-1 agreement, greedy answers.

    tools/validation/gguf_kl.py --work FOLDER [--out FILE.json] [MODEL ...]

Runs the comparison of `qlora verify MERGED --gguf` on the fine-tuned models of `served_models.py`,
which are made in FOLDER once. Needs the extra `llama`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from served_models import NAMES, ROOT, fine_tune, provenance

from qlora_cli.events import Silent
from qlora_cli.files.atomic import write_json
from qlora_cli.jobs import verify_gguf


def main() -> int:
    """Compare all files of the models and write the results. Exits with 1 if a file fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=NAMES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/measurements/gguf_kl.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models, faults = {}, []
    for name in arguments.models:
        made = fine_tune(name, arguments.work / name)
        found = verify_gguf.run(made.merged, against=made.run, data=None, observer=Silent())
        models[name] = found.to_dict()["files"]
        faults += [f"{name}: {fault}" for fault in found.faults]
        print(name, json.dumps(models[name], indent=1), flush=True)
    write_json(arguments.out, {**provenance("gguf_kl.py --work FOLDER"), "models": models})
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
