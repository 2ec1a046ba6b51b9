"""One verb, several tasks: ``--task NAME`` hands the rest of the line to that task's own command.

So each task has its own options, defaults and ``--help``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import click

TASKS = ("text", "forecast")
"""The first one is what a verb does without ``--task``."""
FORECAST = "edge_lora.cli.forecast"


class TaskCommand(click.Command):
    """A command for text that stands aside for ``--task forecast``."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse ``args`` as this command's, or as the named task's."""
        if _named_task(args) != "forecast":
            return super().make_context(info_name, args, parent, **extra)
        command: click.Command = getattr(importlib.import_module(FORECAST), f"{self.name}_command")
        return command.make_context(info_name, args, parent, **extra)


def task_option(help_text: str) -> Callable[[Any], Any]:
    """Return the decorator for ``--task``."""
    return click.option(
        "--task",
        type=click.Choice(TASKS),
        default=TASKS[0],
        show_default=True,
        expose_value=False,
        help=f"{help_text} Options of another: --task NAME --help.",
    )


def _named_task(args: list[str]) -> str | None:
    for i, arg in enumerate(args):
        if arg == "--":
            return None
        if arg.startswith("--task="):
            return arg.removeprefix("--task=")
        if arg == "--task":
            return args[i + 1] if i + 1 < len(args) else None
    return None
