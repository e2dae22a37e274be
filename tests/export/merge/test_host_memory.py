"""Merging and verifying need memory for single tensors, not for the complete model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qlora_cli.runs.layout import RunFolder
from qlora_cli.units import GIB, MIB
from tests.helpers.large_models import LARGEST_BYTES, LAYERS, make_large

torch.set_num_threads(1)

RUN = """
import resource, sys, torch
from pathlib import Path
from qlora_cli.events import Silent
from qlora_cli.jobs import merge, verify
import transformers.models.llama.modeling_llama, bitsandbytes
torch.set_num_threads(1)
run, out, base, limit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
# Limits the private memory of the process; the system can drop the pages of mapped files.
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if base == "verify":
    result = verify.run(out, against=run, observer=Silent())
    print(result.faults)
    assert result.passed
    assert result.greedy_tokens >= 3
elif base == "load":
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
else:
    merge.run(run, out=out, dtype=None, base=base, observer=Silent())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def limited(run: RunFolder, out: Path, what: str, check: bool = True) -> str:
    """Run one job in a process limited to 2 x the largest tensor + 1 GiB, and return its stderr."""
    began = time.monotonic()
    words = [str(run.path), str(out), what, str(2 * LARGEST_BYTES + GIB)]
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
        peak_bytes = int(done.stdout.splitlines()[-1])
        print(f"{what}: {peak_bytes / MIB:.0f} MiB, {time.monotonic() - began:.1f} s")
        # This includes Python with torch and transformers.
        assert peak_bytes < 2 * LARGEST_BYTES + GIB
    return done.stderr


@pytest.mark.slow
def test_a_model_of_several_gigabytes_is_merged(tmp_path: Path) -> None:
    run = make_large(tmp_path, num_layers=24)
    limited(run, tmp_path / "out", "original")
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) > 2.5 * GIB
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_larger_than_memory_is_compared_merged_and_verified(tmp_path: Path) -> None:
    """Four models run, two of them packed during the pass; none is completely in memory."""
    run, out = make_large(tmp_path, num_layers=LAYERS), tmp_path / "out"
    limited(run, out, "auto")
    assert set(json.loads((out / "merge.json").read_text())["judgement"]["table"])  # words: allow
    limited(run, out, "verify")
    # The limit is effective: loading the complete model exceeds it.
    assert "allocate" in limited(run, out, "load", check=False)
    shutil.rmtree(tmp_path)
