"""Every command helps: what it does, each option, ``--json``, an example."""

import click
import pytest
from click.testing import CliRunner

from edge_lora.cli import COMMANDS, main


def command_of(verb):
    command = main.get_command(click.Context(main), verb)
    assert command is not None
    return command


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_verb_is_the_module_and_the_command(verb):
    assert COMMANDS[verb] == f"edge_lora.cli.{verb}"
    assert command_of(verb).name == verb


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_works_and_says_something(verb):
    result = CliRunner().invoke(main, [verb, "--help"])
    assert result.exit_code == 0
    assert len(command_of(verb).help) > 20


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_takes_json(verb):
    assert "--json" in {name for p in command_of(verb).params for name in p.opts}


@pytest.mark.parametrize("verb", COMMANDS)
def test_options_without_help_show_their_default(verb):
    for option in command_of(verb).params:
        if isinstance(option, click.Option) and not option.help:
            assert option.show_default, f"{verb}: {option.opts[0]} says nothing"


# A switch where there is something to list, a choice where there is something to make; a rank to
# squeeze to, or one to run at.
TWO_MEANINGS = {"--slots", "--rank"}


def test_one_name_means_one_thing():
    """An option that two commands share takes the same kind of value in both."""
    kinds = {}
    for verb in COMMANDS:
        for option in command_of(verb).params:
            if isinstance(option, click.Option) and option.opts[-1] not in TWO_MEANINGS:
                first = kinds.setdefault(option.opts[-1], (verb, type(option.type)))
                message = f"{option.opts[-1]} differs between {first[0]} and {verb}"
                assert first[1] is type(option.type), message


def test_an_unknown_command_is_a_usage_error():
    assert CliRunner().invoke(main, ["nonsense"]).exit_code == 2
