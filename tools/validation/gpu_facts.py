"""What this machine is: its card and driver, and the versions that figures depend on.

    python tools/validation/gpu_facts.py --out FILE.json

Versions are asked of the modules themselves: a package may be on PYTHONPATH and not installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_cli.memory.device import inspect_device

PACKAGES = ("torch", "bitsandbytes", "transformers", "accelerate", "safetensors", "peft")
_QUERY = ("driver_version", "pcie.link.gen.max", "power.limit", "clocks.max.sm")


def facts() -> dict[str, Any]:
    """Device, driver and versions."""
    device = inspect_device()
    return {
        "device": {
            "kind": device.kind,
            "name": device.name,
            "capacity_bytes": device.capacity_bytes,
            "capability": device.capability,
            "multiprocessors": device.multiprocessors,
            "context_bytes": device.context_bytes,
            "stand_in": is_fake_gpu(),
        },
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | dict(map(version_of, PACKAGES)),
    }


def is_fake_gpu() -> bool:
    """Whether the card is a stand-in that only counts: it is started with its size in FG_GB."""
    return "FG_GB" in os.environ


def version_of(package: str) -> tuple[str, str | None]:
    """(package, what it calls its version); None where it cannot be imported."""
    if importlib.util.find_spec(package) is None:
        return package, None
    return package, importlib.import_module(package).__version__


def driver() -> dict[str, str] | None:
    """As nvidia-smi tells; None where there is no such program or it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = told.stdout.splitlines()
    if told.returncode or not lines:
        return None
    return dict(zip(_QUERY, (value.strip() for value in lines[0].split(",")), strict=True))


def main(words: Sequence[str] | None = None) -> None:
    """Writes one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(words)
    found = facts()
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
