"""A tokenizer that is missing, damaged or unsuitable is reported before anything is encoded."""

import json

import pytest

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError
from tests.helpers.shared_data import SHARED_DATA, needs_shared_data


@needs_shared_data
def test_a_folder_without_a_tokenizer_gives_none():
    assert load_tokenizer(str(SHARED_DATA / "models" / "gpt_nano_sort")) is None


@needs_shared_data
@pytest.mark.parametrize("content", ["{broken", "[]", '{"model": 3}', "{}"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    config = (SHARED_DATA / "models" / "stories260K" / "tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: damaged"):
        load_tokenizer(str(tmp_path))


@needs_shared_data
@pytest.mark.parametrize("part", ["model", "pre_tokenizer"])
def test_a_tokenizer_that_the_rust_library_refuses_is_a_model_error(tmp_path, part):
    content = json.loads((SHARED_DATA / "models" / "stories260K" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, part: {"type": "Unknown"}}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_folder_with_half_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
