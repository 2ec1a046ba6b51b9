"""The command line: one verb per file, imported when it is used.

``--help`` must not wait for torch, so each command imports its heavy parts when it runs. A new
command is a new file with a ``command`` in it and one row in the table below.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from edge_lora import __version__
from edge_lora.errors import EdgeLoraError, EngineUnavailableError

COMMANDS: dict[str, str] = {
    "train": "edge_lora.cli.train",
    "convert": "edge_lora.cli.convert",
    "inspect": "edge_lora.cli.inspect",
    "verify": "edge_lora.cli.verify",
    "export": "edge_lora.cli.export",
    "run": "edge_lora.cli.run",
    "bench": "edge_lora.cli.bench",
    "plot": "edge_lora.cli.plot",
    "demo": "edge_lora.cli.demo",
    "methods": "edge_lora.cli.methods",
}
"""Verb -> module with a click command named ``command``."""

EXTRAS: dict[str, str] = {
    "train": "train",
    "methods": "train",
    "plot": "train",
    "export": "train,export",
    "demo": "demo",
}
"""Verb -> the extras that install what it imports; ``onnxruntime`` for the others."""


class LazyGroup(click.Group):
    """A click group that imports a command's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name]).command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an EdgeLoraError becomes one message and exit code 1.

        So does a package that is not installed: the message says how to install it.
        """
        try:
            return super().invoke(ctx)
        except EdgeLoraError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            missing = _missing_package(ctx.invoked_subcommand, error)
            raise click.ClickException(str(missing)) from error


def _missing_package(verb: str | None, error: ModuleNotFoundError) -> EngineUnavailableError:
    """Return what to tell about ``error``; raise it again if the module is our own."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "edge_lora"):
        raise error
    return EngineUnavailableError(
        f"edge-lora {verb} needs the package {package}, which is not installed here. "
        f"Install it with: pip install 'edge-lora[{EXTRAS.get(verb or '', 'onnxruntime')}]'"
    )


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-lora")
def main() -> None:
    """Train small adapters, export the base once, switch skills in milliseconds."""
