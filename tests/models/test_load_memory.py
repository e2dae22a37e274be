"""Loading needs host memory for the packed weights and one or two tensors of the checkpoint.

The base of 0.7 GB is created by the test. Loading is measured in a separate process, after imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from large_base import LargeModel

from qlora_cli.units import GIB, MIB
from tests.helpers.large_models import make_large_base

MODEL = LargeModel(num_layers=6, vocab_size=8000)
MODEL_BYTES = 2 * (MODEL.table_weights + MODEL.block_weights)
"""In bfloat16."""
EXTRA_BYTES = 2 * MODEL.table_weights + GIB // 4
"""Memory that loading may need for a moment: two embeddings, and what the allocator keeps."""
LOAD = """
import ctypes, gc, json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from qlora_cli.files.locate import read_config
from qlora_cli.memory.device import profile_of
from qlora_cli.models.build import ModelRequest
from qlora_cli.recipe.schema import Recipe
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.train.state import build_state
from transformers import AutoModelForCausalLM, LlamaConfig
import transformers.models.llama.modeling_llama, bitsandbytes

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {key: int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")}

def load(name, bits, compute):
    folder = Path(name)
    config = read_config(folder / "config.json")
    recipe = Recipe.model_validate({
        "model": {"name": name}, "base": {"bits": bits, "compute_dtype": compute},
        "data": {"train": "none"}, "train": {"activation_checkpointing": True},
    })
    source = lambda _, family: open_source(folder, family)
    device = torch.device("cpu")
    return build_state(ModelRequest(recipe, config, source, device, profile_of(device)))

Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, after the imports
before = memory()
began = time.monotonic()
if sys.argv[2] == "whole":
    state = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    whole = {name: p.detach().clone() for name, p in state.named_parameters()}
    del whole
else:
    state = load(sys.argv[1], int(sys.argv[2]), "bfloat16")
seconds = time.monotonic() - began
peak = memory()["VmHWM"]
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
after = memory()["VmRSS"]
model = state if sys.argv[2] == "whole" else state.loaded.model
weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
print(json.dumps({"before": before["VmRSS"], "peak": peak, "after": after, "weights": weights,
                  "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_large_base(tmp_path_factory.mktemp("large") / "base", MODEL)
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 1, "sharded"
    assert sum(file.stat().st_size for file in files) > 2 * EXTRA_BYTES
    return folder


def measure(base: Path, how: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(base), how], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(how, {k: round(v / MIB) if k != "seconds" else round(v, 1) for k, v in found.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
def test_loading_needs_a_tensor_and_not_a_model(base: Path, bits: str) -> None:
    found = measure(base, bits)
    extra_bytes = found["peak"] - found["after"]
    assert extra_bytes <= EXTRA_BYTES, f"{extra_bytes / MIB:.0f} MiB"
    # Only the packed weights stay in memory.
    assert found["after"] - found["before"] <= found["weights"] + GIB / 4
    assert found["weights"] < (0.5 if bits == "4" else 0.7) * MODEL_BYTES


@pytest.mark.slow
def test_the_measurement_detects_a_complete_copy(base: Path) -> None:
    """A naive loader stores the model twice for a moment."""
    found = measure(base, "whole")
    assert found["peak"] - found["after"] > EXTRA_BYTES
