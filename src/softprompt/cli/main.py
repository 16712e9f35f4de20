"""The command `softprompt`. Its subcommands import torch inside their functions, so that `--help` is quick."""

from __future__ import annotations

import io
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress

import click

from softprompt import __version__
from softprompt.cli.check import check
from softprompt.cli.compare import compare
from softprompt.cli.demo import demo
from softprompt.cli.doctor import doctor
from softprompt.cli.evaluate import evaluate
from softprompt.cli.generate import generate
from softprompt.cli.models import models
from softprompt.cli.predict import predict
from softprompt.cli.prompts import prompts
from softprompt.cli.streams import usable_streams
from softprompt.cli.tune import tune
from softprompt.distributed import launch, signals
from softprompt.errors import SoftpromptError, is_out_of_memory

FIRST_REPORT_SECONDS = 10.0  # seconds in which only the first process reports an error


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="softprompt")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def softprompt(debug: bool) -> None:
    """Adapt a frozen language model to a task with a few learned virtual tokens.

    Start with `softprompt demo`. Results go to stdout, progress to stderr.
    """


for command in (demo, tune, check, compare, evaluate, predict, generate, prompts, models, doctor):
    softprompt.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    Exit codes: 0 done, 1 the work failed, 2 the input is at fault, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    warnings.showwarning = lambda message, *_: click.echo(f"softprompt: warning: {message}", err=True)
    # --debug may stand anywhere; click accepts it only before the subcommand.
    given = (["--debug"] if debug else []) + [argument for argument in given if argument != "--debug"]
    if launch.world_size() > 1 and "tune" not in [argument for argument in given if not argument.startswith("-")][:1]:
        if launch.rank():
            sys.exit(0)
        launch.set_alone()  # only tune runs in several processes
    sys.exit(_run(given, debug) if launch.rank() == 0 else _run_silently(given, debug))


def _run_silently(arguments: Sequence[str], debug: bool) -> int:
    """Run as a process that is not the first: it prints only an error that the first one does not have."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = _run(arguments, debug)
    if code not in (0, 129, 130, 143) and not any(signals.stop_requests()):
        time.sleep(FIRST_REPORT_SECONDS)  # when the first process has failed, the launcher ends this one
        sys.stderr.write(f"process {launch.rank()}: {output.getvalue()}")
    return code


def _run(arguments: Sequence[str], debug: bool) -> int:
    """Run the command; report an error in one message."""
    try:
        with signals.raise_on_termination():
            try:
                with usable_streams():
                    softprompt.main(args=list(arguments), prog_name="softprompt", standalone_mode=False)
            except (Exception, KeyboardInterrupt) as error:
                # click makes an Abort of Ctrl-C.
                ctrl_c = isinstance(error, click.Abort) and isinstance(error.__cause__, KeyboardInterrupt)
                return _report(error.__cause__ if ctrl_c and error.__cause__ else error, debug)
    except KeyboardInterrupt as again:  # while the first one was reported
        return signals.exit_code(again)
    return 0


def _report(error: BaseException, debug: bool) -> int:
    """Print an error, with --debug its traceback, and return the exit code."""
    message, code = _message(error)
    with suppress(OSError):  # a terminal that is gone
        if debug and code <= 2 and not isinstance(error, click.ClickException):
            traceback.print_exception(error)
        if isinstance(error, click.ClickException):
            error.show()
        else:
            click.echo(message, err=True)
    return code


def _message(error: BaseException) -> tuple[str, int]:
    """Return an error's message and exit code."""
    if isinstance(error, click.ClickException):
        return error.message, 2
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", signals.exit_code(error)
    if isinstance(error, click.Abort):
        return "interrupted", 130
    if isinstance(error, SoftpromptError):
        return f"softprompt: {error}", error.exit_code
    if is_out_of_memory(error):
        cure = "use smaller batches (--set micro_batch_tokens=N, or batch_size=N to generate), or take a smaller model"
        return f"softprompt: out of memory; {cure}", 1
    return f"softprompt: unexpected {type(error).__name__}: {error}; --debug shows where", 1
