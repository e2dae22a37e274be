"""bench_inference.py runs, and the measurement in the checkout was written by it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_inference
import pytest
import torch

from qlora_cli.adapters.adapted_modules import adapted_layers


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tool's file on a tiny model."""
    out = tmp_path_factory.mktemp("bench") / "figures" / "tiny.json"
    words = ["--size", "tiny", "--rounds", "2", "--prompt", "4", "--tokens", "2"]
    bench_inference.main([*words, "--out", str(out)])
    return dict(json.loads(out.read_text()))


def keys(content: Any, path: str = "") -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from keys(value, f"{path}/{key}")
    else:
        yield path


def test_every_figure_is_there(measured: dict[str, Any], root: Path) -> None:
    kept = json.loads((root / "tools" / "measurements" / "inference_cpu.json").read_text())
    assert set(keys(kept)) == set(keys(measured))
    assert {"torch", "transformers", "python"} <= kept["versions"].keys()
    assert kept["device"]["name"]
    # The file was measured before the tool moved to tools/benchmarks.
    assert re.match(r"python tools/(benchmarks/)?bench_inference\.py ", kept["command"])


def test_an_adapter_adds_a_and_b_and_no_more(measured: dict[str, Any]) -> None:
    shape = bench_inference.SHAPES["tiny"]
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    rank = bench_inference.ADAPTERS["q and v, rank 8"]["rank"]
    figures = measured["adapters"]["q and v, rank 8"]
    assert figures["parameters"] == layers * 2 * rank * (width + width)
    assert figures["memory_bytes"] == 4 * figures["parameters"]
    assert figures["memory_bytes"] < figures["file_bytes"] < figures["memory_bytes"] + 4096


def test_each_state_is_what_it_says(tmp_path: Path) -> None:
    model = bench_inference.make_model(tmp_path / "model", "tiny")
    settings = bench_inference.ADAPTERS["all linears, rank 16"]
    folder = bench_inference.make_adapter(model, tmp_path / "adapter", settings)
    bench = bench_inference.Bench(model, {"one": folder})
    weights = bench.loaded.model.model.layers[0].self_attn.q_proj
    before = weights.weight.clone()
    for state in (*bench_inference.STATES, *reversed(bench_inference.STATES)):
        bench.enter(state, "one")
        assert bool(list(adapted_layers(bench.loaded.model))) is (state == "unmerged")
        assert torch.equal(weights.weight, before) is (state != "merged"), state


def test_a_spread_is_the_quartiles() -> None:
    figures = bench_inference.spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert figures == {"median": 3.0, "lower_quartile": 2.0, "upper_quartile": 4.0, "num": 5}
