"""check_layers.py finds no fault in the package, and each kind of fault in a small one."""

from __future__ import annotations

from pathlib import Path

import check_layers
import pytest

SOUND = {
    "__init__.py": "def __getattr__(name):\n    from house.jobs.train import run\n    return run\n",
    "errors.py": "class Fault(Exception): ...\n",
    "recipe/__init__.py": "",
    "recipe/schema.py": "from house.errors import Fault\n",
    "nn/__init__.py": "",
    "nn/lora.py": "import torch\n",
    "train/__init__.py": "",
    "train/step.py": "def step(loss):\n    loss.backward()\n",
    "train/runtime.py": "import accelerate\n",
    "jobs/__init__.py": "",
    "jobs/train.py": "from house.nn import lora\ndef run(): ...\n",
    "jobs/results.py": "from house.recipe import schema\n",
    "ui/__init__.py": "",
    "ui/tables.py": "from rich import box\nfrom house.jobs import results\n",
    "cli/__init__.py": "",
    "cli/main.py": "import click\ndef f():\n    from house.jobs import train\n    print(train)\n",
}


FAULTS = {
    "from a higher layer": (
        "nn/lora.py",
        "from house.jobs.train import run\n",
        "in a higher layer",
    ),
    "late and from a higher layer": (
        "nn/lora.py",
        "def f():\n    import house.jobs.train\n",
        "in a higher layer",
    ),
    "relative and from a higher layer": (
        "nn/lora.py",
        "from ..jobs import train\n",
        "in a higher layer",
    ),
    "unknown layer": ("attic/box.py", "import os\nX = 1\n", "is not in LAYERS"),
    "ui imports torch": ("ui/tables.py", "import torch\n", "imports torch"),
    "the root loads torch at once": (
        "__init__.py",
        "from house.nn import lora\n",
        "house -> house.nn.lora",
    ),
    "ui imports torch late": ("ui/tables.py", "def f():\n    import torch\n", "imports torch"),
    "recipe imports torch": ("recipe/schema.py", "from torch import nn\n", "imports torch"),
    "cli imports torch through a job": ("cli/main.py", "from house.nn import lora\n", "house.nn"),
    "ui imports torch through results": ("jobs/results.py", "import torch\n", "house.jobs.results"),
    "a job prints": ("jobs/train.py", "def run():\n    print(1)\n", "print("),
    "a job writes": (
        "jobs/train.py",
        "import sys\ndef run(): sys.stderr.write('')\n",
        "sys.stderr",
    ),
    "a job knows rich": ("jobs/train.py", "import rich.table\ndef run(): ...\n", "rich.table"),
    "a name through another file": (
        "jobs/train.py",
        "from house.recipe.schema import Fault\ndef run(): ...\n",
        "Fault is not defined in house.recipe.schema",
    ),
    "a layer re-exports names": (
        "jobs/__init__.py",
        "from house.jobs.train import run\n",
        "only the root",
    ),
    "from the root": ("jobs/train.py", "from house import run as r\ndef run(): ...\n", "the root"),
    "the root itself": ("jobs/train.py", "import house\ndef run(): ...\n", "the root"),
    "accelerate elsewhere": ("train/step.py", "import accelerate\n", "only train/runtime.py"),
    "peft": ("nn/lora.py", "def f():\n    from peft import PeftModel\n", "peft and trl"),
    "trl": ("nn/lora.py", "import trl.trainer\n", "peft and trl"),
    "two backwards": ("nn/lora.py", "def f(x):\n    x.sum().backward()\n", ".backward("),
    "no backward": ("train/step.py", "", "no .backward("),
    "utils": ("nn/utils.py", "", "does not describe"),
}


def build(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "house"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


def test_the_package_is_sound(root: Path) -> None:
    assert check_layers.check(root / "qlora_cli") == []


def test_a_sound_house_has_no_faults(tmp_path: Path) -> None:
    assert check_layers.check(build(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("path", "text", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(tmp_path: Path, path: str, text: str, expected: str) -> None:
    faults = check_layers.check(build(tmp_path, {**SOUND, path: text}))
    assert any(expected in fault for fault in faults), faults


def test_each_rule_catches_something(tmp_path: Path) -> None:
    caught = set()
    for number, (path, text, _) in enumerate(FAULTS.values()):
        package = build(tmp_path / str(number), {**SOUND, path: text})
        modules = check_layers._read(package)
        caught |= {rule.__name__ for rule in check_layers.RULES if list(rule(modules))}
    assert caught == {rule.__name__ for rule in check_layers.RULES}


def test_imports_for_type_checkers_do_not_count(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    assert check_layers.check(build(tmp_path, {**SOUND, "ui/tables.py": text})) == []
