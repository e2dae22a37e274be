"""Damaged and absurd files of a base: only our own errors come out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given

from qlora_cli.data.load import ModelLimits
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.files.dtype import file_dtype
from qlora_cli.files.locate import read_config
from qlora_cli.files.source import WEIGHTS_FILE, WEIGHTS_INDEX, fingerprint, read_folder
from qlora_cli.models.build import skeleton
from tests.helpers.fuzz import changed_json, fuzzed, only_own_errors, write
from tests.helpers.runs import make_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "gpt2"):
        make_base(folder / family, family, shard="100KB")
    return folder


@pytest.fixture
def base(bases: Path, tmp_path: Path) -> Path:
    """Return a copy of a base that may be changed."""
    return Path(shutil.copytree(bases / "llama", tmp_path / "base"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_config(bases: Path, tmp_path: Path, family: str) -> None:
    valid = json.loads((bases / family / "config.json").read_text())
    file = tmp_path / "config.json"

    @fuzzed(0.5)
    @given(changed_json(valid))
    def check(content: bytes) -> None:
        write(file, content)
        with only_own_errors():
            config = read_config(file)
            file_dtype(config)
            ModelLimits.of(config)
            skeleton(config, torch.float32)

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(base: Path, name: str) -> None:
    valid = json.loads((base / name).read_text())
    if name == "tokenizer.json":
        # A small vocabulary, so that most changes are elsewhere.
        vocabulary = valid["model"]["vocab"]
        valid["model"]["vocab"] = {token: vocabulary[token] for token in list(vocabulary)[:20]}

    @fuzzed(0.5)
    @given(changed_json(valid))
    def check(content: bytes) -> None:
        write(base / name, content)
        with only_own_errors():
            tokenizer = load_tokenizer(str(base))
            assert tokenizer("ab")["input_ids"] is not None

    check()


def test_index(base: Path) -> None:
    valid = json.loads((base / WEIGHTS_INDEX).read_text())
    assert not (base / WEIGHTS_FILE).exists()

    @fuzzed()
    @given(changed_json(valid))
    def check(content: bytes) -> None:
        write(base / WEIGHTS_INDEX, content)
        with only_own_errors():
            read_folder(base)
            fingerprint(base)

    check()
