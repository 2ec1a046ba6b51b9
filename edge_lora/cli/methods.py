"""``edge-lora methods``: the training methods and what can be set on each."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import click

from edge_lora.cli.output import json_option, print_json, print_table


@click.command("methods")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the training methods and their options, or those of method NAME.

    \b
    edge-lora methods
    edge-lora methods shira
    """
    from edge_lora.methods import list_methods

    described = {method: describe(method) for method in ([name] if name else list_methods())}
    if as_json:
        print_json(described)
        return
    rows = [
        [method, option["name"], option["default"], option["meaning"]]
        for method, options in described.items()
        for option in options
    ]
    print_table(
        ["method", "option", "default", "meaning"], rows, "set an option with --set NAME=VALUE"
    )


def describe(method: str) -> list[dict[str, Any]]:
    """Return name, default and meaning of every option that can be written on a command line."""
    from edge_lora.methods import get_method

    config = get_method(method).config_class
    meanings = dict(
        re.findall(r"^\s{8}(\w+): (.*(?:\n\s{12}.*)*)", config.__doc__ or "", re.MULTILINE)
    )
    return [
        {
            "name": field.name,
            "default": field.default,
            "meaning": " ".join(meanings.get(field.name, "").split()),
        }
        for field in dataclasses.fields(config)
        if field.metadata.get("recorded", True)
    ]
