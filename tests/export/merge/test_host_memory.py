"""Merging and verifying need memory for single tensors, not for the complete model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from large_base import LargeModel

from qlora_cli.units import MIB
from tests.helpers.large_models import make_large_base, make_large_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from Linux's /proc"),
]

MODEL = LargeModel(num_layers=6, width=1024, inner=2816, vocab_size=2048)
MODEL_BYTES = 2 * (MODEL.table_weights + MODEL.block_weights)
"""155 MiB: what the merged model has in 16 bit."""
ALLOWANCE = 140 * MIB
"""Private memory beside that of the imported libraries."""
RUN = """
import json, os, resource, sys
import torch
from pathlib import Path
from qlora_cli.events import Silent
from qlora_cli.jobs import merge, verify
import transformers.models.llama.modeling_llama, bitsandbytes
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)


def private_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def do(what):
    out = folder / ("original" if what == "original" else "auto")
    if what == "verify":
        result = verify.run(out, against=run, observer=Silent())
        assert result.passed, result.faults
        assert result.greedy_tokens >= 3
    elif what == "load":
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    else:
        merge.run(run, out=out, dtype=None, base=what, observer=Silent())


run, folder, allowance = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for what in sys.argv[4:]:
    if not os.fork():
        # Limits the private memory of the process; the system can drop the pages of mapped files.
        resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + allowance,) * 2)
        error = ""
        try:
            do(what)
        except BaseException as fault:
            error = repr(fault)
        finally:
            print(json.dumps({what: error}), flush=True)
            os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Merge, verify and load in processes with limited memory.

    They are forks of a process that has imported everything. Returns the error of each, empty if it
    ended well.
    """
    folder = tmp_path_factory.mktemp("large")
    run = make_large_run(folder / "run", make_large_base(folder / "base", MODEL), MODEL)
    words = [str(run.path), str(folder), str(ALLOWANCE), "original", "auto", "verify", "load"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True
    )
    results: dict[str, str] = {}
    for line in done.stdout.splitlines():
        results |= json.loads(line)
    yield results
    shutil.rmtree(folder)


@pytest.mark.parametrize("job", ["original", "auto", "verify"])
def test_a_model_larger_than_memory_is_merged_and_verified(
    errors: dict[str, str], job: str
) -> None:
    """`--base auto` and verification run four models, and none of them is completely in memory."""
    assert MODEL_BYTES > ALLOWANCE
    assert errors[job] == ""


def test_the_limit_is_effective(errors: dict[str, str]) -> None:
    """Loading the complete model exceeds it."""
    assert "allocate" in errors["load"]
