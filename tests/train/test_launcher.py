"""The launcher ends all processes if one ends, and passes signals on. No process imports torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.train import launcher
from qlora_cli.train.launcher import check_no_launcher, launch, reserved_port

WAIT = "import time; time.sleep(60)"
"""A process that hangs, such as one that waits for a process that has ended."""


def started(script: str, number: int = 2) -> int:
    """Run a script in several processes; it has the variable `rank`."""
    prefix = "import os, signal, sys; rank = int(os.environ['RANK'])\n"
    return launch([prefix + script], number, (sys.executable, "-c"))


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.5)


def test_the_exit_code_is_that_of_the_main_process() -> None:
    assert started("sys.exit(0)") == 0
    assert started("sys.exit(3 if rank == 0 else 0)") == 3


def test_each_process_has_the_environment_of_accelerate(tmp_path: Path) -> None:
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')"
    write = f"open('{tmp_path}/' + str(rank), 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert started(write, 3) == 0
    found = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert found == [f"{rank} {rank} 3 127.0.0.1" for rank in range(3)]


def test_a_killed_process_ends_the_main_one_with_the_reason() -> None:
    script = f"if rank: os.kill(os.getpid(), signal.SIGKILL)\n{WAIT}"
    start = time.monotonic()
    with pytest.raises(QloraError, match="process 1 of 2 was ended by SIGKILL") as raised:
        started(script)
    assert time.monotonic() - start < 50  # The main process would have waited longer.
    # Its log is empty, so the message does not name it.
    hint = "the system kills a process if host memory is short; continue the run with --resume"
    assert raised.value.hint == hint


def test_an_error_of_another_process_is_shown_with_its_log() -> None:
    with pytest.raises(QloraError) as raised:
        started(f"if rank: sys.exit('error: no such file')\n{WAIT}")
    assert raised.value.what.startswith("process 1 of 2 ended with exit code 1")
    assert raised.value.hint is not None
    assert "its last lines: error: no such file; continue the run" in raised.value.hint
    log = Path(raised.value.hint.split()[3].rstrip(";"))
    assert log.read_text() == "error: no such file\n"


def test_an_error_that_all_have_is_reported_once() -> None:
    assert started("sys.exit(130)") == 130


SCRIPT = """
import signal, sys, time
from qlora_cli.train import launcher
child = '''
import os, signal, sys, time
from qlora_cli.train.launcher import end_with_launcher
end_with_launcher()
folder = sys.argv[1] + "/" + os.environ["RANK"]
def stop(number, frame):
    open(folder + signal.Signals(number).name, "w").close()
    sys.exit(130)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
open(folder + "ready", "w").close()
time.sleep(60)
'''
launcher._GRACE_SECONDS = 0.5
sys.exit(launcher.launch([child, sys.argv[1]], 2, (sys.executable, "-c")))
"""


def start_launcher(folder: Path) -> subprocess.Popen[bytes]:
    """Start a launcher and wait until its processes are ready."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)])
    while process.poll() is None and len(list(folder.glob("*ready"))) < 2:
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_signal_reaches_the_main_process_only(tmp_path: Path) -> None:
    process = start_launcher(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait(50) == 130
    assert (tmp_path / "0SIGINT").exists()
    assert not (tmp_path / "1SIGINT").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_the_processes_end_with_a_killed_launcher(tmp_path: Path) -> None:
    process = start_launcher(tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 50
    while len(list(tmp_path.glob("*SIGTERM"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_reserved_port_is_free_for_the_main_process_only() -> None:
    with reserved_port() as port, reserved_port() as other, socket.socket() as stranger:
        assert port != other
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        # As the store of torch.distributed does.
        with socket.create_server(("127.0.0.1", port), reuse_port=False) as store:
            assert store.getsockname()[1] == port


def test_a_launcher_inside_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="another launcher"):
        check_no_launcher()
