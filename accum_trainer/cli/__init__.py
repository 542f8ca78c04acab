"""The command `accum-trainer`: parse, call, translate errors; nothing else.

No command imports torch before it needs it, so that `--help` and `plan` answer at once.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

import click
from click.shell_completion import CompletionItem

from accum_trainer.cli.quiet import open_missing_streams, quiet_libraries
from accum_trainer.errors import AccumTrainerError, ConfigError

# Name -> module of this package that holds `command`, and the line of `accum-trainer --help`.
COMMANDS = {
    "train": "Train with an exact effective batch; one record per update.",
    "verify": "Prove on your model, data and engine that the update is that of one big batch; or "
    "check your own loop.",
    "plan": "Print B, K, W, effective batch, updates, warm-up and learning rate; needs no GPU.",
    "config": "Write launch files for one GPU, many GPUs, clusters and independent runs.",
    "launch": "Start training under a launch file: free ports, a log per process, the failed "
    "process's own error.",
    "requeue": "Say whether a stopped batch job goes back into the queue; batch scripts call it.",
    "doctor": "Say what this machine offers, what would not work here, and the command that mends "
    "it.",
    "checkpoint": "Write the model of a run's checkpoint for from_pretrained.",
    "compare": "Compare loss curves at equal updates, samples and time, and how noisy they are.",
    "report": "Write runs and their comparison as one HTML file that needs no server.",
    "sweep": "Find the largest effective batch that loses nothing per sample: branches of a run.",
    "merge": "Average the results of independent runs, weighted by samples trained.",
    "panel": "Open a local web page that sets up, starts, stops and watches trainings.",
    "completion": "Print the script by which bash, zsh or fish complete this command.",
}


# Names of other tools, and what to run here.
_OTHER_NAMES = {
    "fit": "train",
    "finetune": "train",
    "run": "train",
    "resume": "train",
    "export": "checkpoint export",
    "save": "checkpoint export",
    "create": "config create",
    "init": "config create",
    "check": "verify",
    "test": "verify",
    "diff": "compare",
    "plot": "compare",
    "average": "merge",
    "estimate": "plan",
}


class _Commands(click.Group):
    """Loads a command's module when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return import_module(f"accum_trainer.cli.{name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0].lower().replace("_", "-")
        is_wrong = args[0] not in COMMANDS and not args[0].startswith("-")
        if is_wrong and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, [*COMMANDS, *_OTHER_NAMES], n=1)
            meant = _OTHER_NAMES.get(near[0], near[0]) if near else None
            hint = f"Did you mean '{meant}'?" if meant else f"There are {', '.join(COMMANDS)}."
            ctx.fail(f"No such command '{args[0]}'. {hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click's, without loading each command for its line of help."""
        names = [
            CompletionItem(name, help=text)
            for name, text in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: accum-trainer train --model tiny --batch-size 4 --gradient-accumulation-steps "
    "8 --steps 100 --lr 1e-3",
)
@click.version_option(package_name="accum-trainer")
def cli() -> None:
    """Gradient accumulation that is exactly right: the effective batch is the unit of training."""


def main(arguments: Sequence[str] | None = None, shares_terminal: bool = True) -> None:
    """Run the command line and exit: 0 done, 2 wrong input, 75 stopped and saved, 1 anything
    else.

    Args:
        shares_terminal: all processes of the job write to one terminal, so that an error which all
            of them have is shown once.
    """
    open_missing_streams()
    quiet_libraries()
    try:
        sys.exit(
            cli.main(
                args=None if arguments is None else list(arguments),
                prog_name="accum-trainer",
                standalone_mode=False,
            )
        )
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as wrong:
        if shares_terminal:
            _let_main_speak()
        wrong.show()
        sys.exit(wrong.exit_code)
    except AccumTrainerError as wrong:
        if shares_terminal and isinstance(wrong, ConfigError):
            _let_main_speak()
        rank = "" if _is_main() else f" (process {os.environ['RANK']})"
        click.echo(f"error{rank}: {wrong}", err=True)
        sys.exit(wrong.exit_status)


# Longer than a launcher takes to see that one process failed, and to end the others.
_MAIN_SPEAKS_WITHIN_SEC = 8.0


def _let_main_speak() -> None:
    """Give the main process time to report an error that all processes have; its launcher then
    ends this one. If only this process has the error, the wait runs out and it reports it."""
    if not _is_main():
        time.sleep(_MAIN_SPEAKS_WITHIN_SEC)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
