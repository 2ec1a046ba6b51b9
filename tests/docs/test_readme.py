"""The README is executed: its Python runs, its commands parse, its files exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from edge_lora.cli import COMMANDS, main

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [
    line
    for language, code in BLOCKS
    if language == "sh"
    for line in code.splitlines()
    if line.startswith("edge-lora ")
]


def test_there_is_something_to_check():
    assert PYTHON
    assert SHELL


@pytest.mark.torch
@pytest.mark.ort
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_runs(number, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(PYTHON[number], f"README block {number}", "exec"), names)
    if "adapted" in names:
        (key, base), (_, adapted) = *names["base"].items(), *names["adapted"].items()
        assert (base != adapted).any(), key
        assert (
            names["session"].run({"input": names["batches"][0]["x"].numpy()})[key] == base
        ).all()
        names["session"].close()


@pytest.mark.parametrize("line", SHELL)
def test_commands_parse(line):
    """Every option exists and every value has its type; nothing is run."""
    _, verb, *arguments = shlex.split(line)
    command = main.get_command(click.Context(main), verb)
    assert command is not None, f"no command {verb!r}"
    command.make_context(verb, arguments)


def test_every_command_is_described():
    text = README.read_text(encoding="utf-8")
    for verb in COMMANDS:
        assert f"| `edge-lora {verb}` |" in text


def test_no_command_is_made_up():
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"edge-lora ([a-z]+)", text)) <= COMMANDS.keys()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
