"""`accum-trainer completion`: the script by which a shell completes this command.

click writes the script and answers the shell; here is what it does not know of arguments that are
passed on to `train`.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

PROGRAM = "accum-trainer"
VARIABLE = "_ACCUM_TRAINER_COMPLETE"  # click's name for it
_SHELLS = {
    "bash": "echo 'source <(accum-trainer completion bash)' >> ~/.bashrc",
    "zsh": "echo 'source <(accum-trainer completion zsh)' >> ~/.zshrc (after compinit)",
    "fish": "accum-trainer completion fish > ~/.config/fish/completions/accum-trainer.fish",
}


@click.command("completion", epilog="To install: " + "; ".join(_SHELLS.values()) + ".")
@click.argument("shell", type=click.Choice(tuple(_SHELLS)), metavar="bash|zsh|fish")
def command(shell: str) -> None:
    """Print the script by which bash (4.4 or newer), zsh or fish complete commands, options, their
    values and files."""
    from accum_trainer.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(cli, {}, PROGRAM, VARIABLE)
    # `source()` would start bash to ask for its version.
    click.echo(script.source_template % script.source_vars())


def complete_train(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete arguments that are passed on to `train` as `train` does."""
    from accum_trainer.cli.train import command as train

    words = list(context.params.get(parameter.name or "") or ())
    return ShellComplete(train, {}, PROGRAM, VARIABLE).get_completions(words, incomplete)


train_arguments = click.argument(
    "train",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="-- [TRAIN-ARGS]...",
    shell_complete=complete_train,
)
