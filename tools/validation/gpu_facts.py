"""Write the properties of this machine: GPU, driver, and the versions that figures depend on.

    python tools/validation/gpu_facts.py --out FILE.json

Versions are read from the modules, because a package may be on PYTHONPATH without being installed.
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
    """Return device, driver and versions."""
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
    """Return whether the GPU is a fake one that only counts memory; FG_GB is its size in GB."""
    return "FG_GB" in os.environ


def version_of(package: str) -> tuple[str, str | None]:
    """Return (package, version); the version is None if the package cannot be imported."""
    if importlib.util.find_spec(package) is None:
        return package, None
    return package, importlib.import_module(package).__version__


def driver() -> dict[str, str] | None:
    """Return driver properties from nvidia-smi; None if it does not exist or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        return None
    return dict(zip(_QUERY, (value.strip() for value in lines[0].split(",")), strict=True))


def main(words: Sequence[str] | None = None) -> None:
    """Write one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(words)
    content = facts()
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
