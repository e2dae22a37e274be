"""A base on disk is trained, evaluated, merged and verified in fewer addresses than it has."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from address_space import CONTROL, validate
from large_base import LargeModel

MODEL = LargeModel(num_layers=8, width=1024, inner=2816, vocab_size=2048)
SHARE = 0.7
"""Addresses beside those of the imported libraries, as a share of the packed base."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the address space from Linux's /proc")
def test_a_base_on_disk_needs_fewer_addresses_than_it_has_bytes(tmp_path: Path) -> None:
    """The base has 214 MB in 16 bit. On the device it does not fit the same limit."""
    result = validate(tmp_path / "job", MODEL, bits=16, share=SHARE)
    codes = {name: command["code"] for name, command in result["commands"].items()}
    assert codes == {CONTROL: 3, "train": 0, "eval": 0, "merge": 0, "verify": 0}, result
    assert "out of memory" in result["commands"][CONTROL]["error"]
    for name, command in result["commands"].items():
        assert command["address_space_bytes"] <= result["allowance_bytes"], name
    assert result["passed"]
    shutil.rmtree(tmp_path)
