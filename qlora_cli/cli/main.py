"""`qlora`: a guest of the package. Says what went wrong, and by exit code which kind of wrong.

Importing this file imports neither torch nor bitsandbytes: each command imports its job when it
runs.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence

import click

from qlora_cli.cli.chat import chat
from qlora_cli.cli.data import data
from qlora_cli.cli.doctor import doctor
from qlora_cli.cli.eval import eval_
from qlora_cli.cli.generate import generate
from qlora_cli.cli.merge import merge
from qlora_cli.cli.plan import plan
from qlora_cli.cli.quickstart import quickstart
from qlora_cli.cli.recipe import recipe
from qlora_cli.cli.report import report
from qlora_cli.cli.train import train
from qlora_cli.cli.verify import verify
from qlora_cli.errors import Interrupted, QloraError


class _Ordered(click.Group):
    """Lists commands in the order in which a person meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Ordered,
    commands=[
        quickstart,
        plan,
        train,
        report,
        merge,
        verify,
        generate,
        chat,
        eval_,
        data,
        doctor,
        recipe,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 ok, 1 failed, 2 usage or recipe, 3 does not fit, "
    "4 verification failed, 130 interrupted.",
)
@click.version_option(package_name="qlora-cli", message="%(prog)s %(version)s")
def qlora() -> None:
    """Fine-tune a language model with 4-bit LoRA on one GPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line and exits with the contract's code."""
    # Read by OpenMP when torch is imported, later. Threads that spin while they wait make training
    # twenty times slower as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(arguments)
    # All that lives ends with the process: its last collection need not look through it.
    gc.freeze()
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    try:
        code = qlora.main(args=arguments, prog_name="qlora", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # What click makes of Ctrl-C outside a job that handles it.
        return Interrupted.exit_code
    except Exception as error:  # The last place that can say anything; every kind ends here.
        return _failed(error)
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    from qlora_cli.ui import console, failures

    if os.environ.get(failures.TRACEBACK_SWITCH, "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, QloraError):
        failures.show(error, console.messages())
        return error.exit_code
    failures.show_unexpected(error, console.messages())
    return 1
