"""Options and arguments that are paths: a shell completes them as files."""

from __future__ import annotations

import functools

import click
from click.shell_completion import CompletionItem


def complete_files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell offer files and folders."""
    return [CompletionItem(incomplete, type="file")]


path_option = functools.partial(click.option, shell_complete=complete_files)
path_argument = functools.partial(click.argument, shell_complete=complete_files)
