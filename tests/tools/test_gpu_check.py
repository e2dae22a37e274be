"""tools/gpu_check runs without a GPU with `--tiny`, and keeps results if a later check fails."""

from __future__ import annotations

import json
from pathlib import Path

import bench_train
import gpu_check
import pytest
from gpu_check import Check, Report


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_check_runs_an_existing_tool(kind: str, tiny: bool, root: Path) -> None:
    checks = gpu_check.checks(kind, tiny)
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.words[0] == "-m" or (root / check.words[0]).is_file()
        assert "{out}" in " ".join(check.words)


def test_the_order_of_a_real_run() -> None:
    names = [check.name for check in gpu_check.checks("cuda", tiny=False)]
    assert names[:5] == ["environment", "tests", "plan", "plan_of_real_shapes", "cuda_smoke"]
    assert names[5:9] == ["inference", "training_starter", "training_1B", "training_8B"]
    assert names[9:] == ["tools_1B", "tools_8B"]


def test_the_speed_of_a_tiny_shape(tmp_path: Path) -> None:
    words = ["--shape", "tiny", "--device", "cpu", "--seq-len", "64", "--rounds", "2"]
    out = tmp_path / "speed.json"
    bench_train.main([*words, "--steps", "1", "--alone", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["ours"]["tokens_per_second"]["num"] == 2
    first, last = content["ours"]["losses_first_and_last"]
    assert last < first
    assert content["peft"] == "not asked for"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_peft_trains_too(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    words = ["--shape", "tiny", "--device", "cpu", "--seq-len", "32", "--rounds", "2"]
    out = tmp_path / "speed.json"
    bench_train.main([*words, "--steps", "1", "--out", str(out)])
    content = json.loads(out.read_text())
    first, last = content["peft"]["losses_first_and_last"]
    assert last < first
    assert content["ours_is_so_many_times_as_fast"]["num"] == 2


@pytest.mark.slow
def test_environment_and_tests_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--tiny", "--only", "tests", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["failed"] == []
    assert content["parts"]["environment"]["figures"]["versions"]["bitsandbytes"]
    found = content["parts"]["tests"]["figures"]
    assert found["tests"] > 100
    assert found["failures"] == found["errors"] == 0
    assert "tests: exit code 0" in capsys.readouterr().err


@pytest.mark.slow
def test_results_are_kept_if_a_later_check_fails(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", {"parts": {}})
    writes = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"speed\": 7}')"
    dies = f"{writes}; sys.exit('out of memory')"
    hangs = "import time; print('began', flush=True); time.sleep(60)"
    half = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"sp')"
    for name, script, limit in (
        ("environment", writes, 60),
        ("dies", dies, 60),
        ("hangs", hangs, 3),
        ("half", half, 60),
    ):
        check = Check(name, ("-c", script, "{out}"), limit)
        report.add(name, gpu_check.run(check, limit))
        content = json.loads((tmp_path / "gpu.json").read_text())["parts"]
        assert content["environment"]["figures"] == {"speed": 7}
    assert content["environment"]["exit_code"] == 0
    assert content["dies"]["exit_code"] == 1
    assert content["dies"]["figures"] == {"speed": 7}
    assert "out of memory" in content["dies"]["output"]
    assert content["hangs"]["exit_code"] is None
    assert content["hangs"]["output"].startswith("began")
    assert content["half"]["figures"] is None
    assert "JSONDecodeError" in content["half"]["output"]
    assert report.content["failed"] == ["dies", "hangs"]


def test_the_report_contains_no_folder_of_this_machine(root: Path) -> None:
    script = "import sys, pathlib; print(sys.prefix); print(pathlib.Path.cwd()); print(sys.argv[1])"
    found = gpu_check.run(Check("paths", ("-c", script, "{out}"), 60), 60)
    assert found["output"].split() == ["PYTHON", ".", "FOLDER/figures"]


def test_figures_of_tests_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tests.xml"
    file.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="tests.gpu" name="a"><properties>'
        '<property name="share" value="0.001"/></properties></testcase>'
        '<testcase classname="tests.gpu" name="b"><failure message="assert 1 == 2"/></testcase>'
        '<testcase classname="tests.gpu" name="c"><skipped message="no GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert gpu_check.read_tests(file) == {
        "tests": 3,
        "failures": 1,
        "errors": 0,
        "skipped": 1,
        "not_passed": {"tests.gpu::b": "assert 1 == 2"},
        "recorded": {"tests.gpu::a": {"share": "0.001"}},
    }


def test_without_a_gpu_only_the_environment_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"exit_code": 0, "seconds": 0.1, "figures": {"device": {"kind": "cpu"}}}
    monkeypatch.setattr(gpu_check, "run", lambda *_: facts)
    assert gpu_check.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["environment"]
