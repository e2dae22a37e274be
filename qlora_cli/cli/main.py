"""The command line `qlora`: the group of commands, error output and exit codes.

Importing this module imports neither torch nor bitsandbytes, so that `qlora --help` is fast. Each
command imports its job when it runs.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from qlora_cli.cli.cache import cache
from qlora_cli.cli.chat import chat
from qlora_cli.cli.completion import completion
from qlora_cli.cli.data import data
from qlora_cli.cli.doctor import doctor
from qlora_cli.cli.eval import eval_
from qlora_cli.cli.generate import generate
from qlora_cli.cli.init import init
from qlora_cli.cli.merge import merge
from qlora_cli.cli.models import models
from qlora_cli.cli.output import echo, emit_error
from qlora_cli.cli.plan import plan
from qlora_cli.cli.push import push
from qlora_cli.cli.quantize import quantize
from qlora_cli.cli.quickstart import quickstart
from qlora_cli.cli.recipe import recipe
from qlora_cli.cli.report import report
from qlora_cli.cli.sweep import sweep
from qlora_cli.cli.train import train
from qlora_cli.cli.verify import verify
from qlora_cli.errors import Interrupted, QloraError
from qlora_cli.shortage import converted


class _Commands(click.Group):
    """The group of commands, listed in the order of use instead of the alphabet.

    With `--json`, an error of a command is also printed as one JSON object on stdout.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            known = converted(error)
            emit_error(ctx, known, getattr(known, "exit_code", 1))
            if known is error:
                raise
            raise known from error


@click.group(
    cls=_Commands,
    commands=[
        quickstart,
        init,
        plan,
        quantize,
        train,
        sweep,
        report,
        merge,
        verify,
        push,
        generate,
        chat,
        eval_,
        data,
        cache,
        doctor,
        models,
        recipe,
        completion,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 1 job failed, 2 wrong usage, recipe, data or base model, "
    "3 job does not fit into memory, 4 verification failed, 130 interrupted.",
)
@click.version_option(package_name="qlora-cli", message="%(prog)s %(version)s")
def qlora() -> None:
    """Fine-tune a language model with LoRA on a quantized base, on one GPU or on a CPU.

    A job is described by a recipe, a YAML file. Start with `qlora quickstart`, which needs no
    network. For your own data, write a recipe with `qlora init`, then run data, plan, train,
    report, merge and verify in this order.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit the process with its exit code.

    arguments: the words after `qlora`; None reads them from `sys.argv`.
    """
    # OpenMP reads this when torch is imported. Threads that spin while they wait make training
    # twenty times slower if another process uses the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(arguments)
    # The process ends here. Skip the last garbage collection, which would traverse every object.
    gc.freeze()
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; errors are printed on stderr."""
    try:
        code = qlora.main(args=arguments, prog_name="qlora", standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        echo(shown.getvalue(), end="", err=True)
        return error.exit_code
    except click.Abort:  # click raises it for Ctrl-C outside a job.
        return Interrupted.exit_code
    except Exception as error:  # Every error is printed and becomes an exit code.
        return _print_error(error)
    return code if isinstance(code, int) else 0


def _print_error(error: Exception) -> int:
    """Print an error on stderr and return its exit code."""
    from qlora_cli.ui import console, failures

    if os.environ.get(failures.TRACEBACK_SWITCH, "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, QloraError):
        failures.show(error, console.messages())
        return error.exit_code
    failures.show_unexpected(error, console.messages())
    return 1
