from pathlib import Path

import click
import pytest

from edge_lora.cli.output import AdapterType, human_bytes, parse_settings


@pytest.mark.parametrize(
    ("text", "name", "path", "scale"),
    [
        ("roman=a/b.safetensors", "roman", "a/b.safetensors", 1.0),
        ("roman=a/b.safetensors:0.5", "roman", "a/b.safetensors", 0.5),
        ("a/b.safetensors", "b", "a/b.safetensors", 1.0),
        ("a/b.safetensors:-2", "b", "a/b.safetensors", -2.0),
        ("x=C:/a.safetensors:1e-1", "x", "C:/a.safetensors", 0.1),
    ],
)
def test_adapter_argument(text, name, path, scale):
    found = AdapterType().convert(text, None, None)
    assert (found.name, found.path, found.scale) == (name, Path(path), scale)


def test_a_scale_that_is_no_number_is_a_usage_error():
    with pytest.raises(click.BadParameter, match="scale 'half' is not a number"):
        AdapterType().convert("a=b.safetensors:half", None, None)


def test_an_existing_file_with_a_colon_is_taken_whole(tmp_path):
    path = tmp_path / "a:b"
    path.touch()
    assert AdapterType().convert(f"x={path}", None, None).path == path


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank=8", 8),
        ("density=0.01", 0.01),
        ("mask=snip", "snip"),
        ("flag=true", True),
        ("name=a=b", "a=b"),
        ("empty=", ""),
    ],
)
def test_settings(setting, value):
    assert list(parse_settings([setting]).values()) == [value]


@pytest.mark.parametrize("setting", ["rank", "=8"])
def test_a_setting_without_key_or_value_is_a_usage_error(setting):
    with pytest.raises(click.BadParameter, match="is not KEY=VALUE"):
        parse_settings([setting])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (4_700_000, "4.7 MB"), (2_500_000_000, "2.5 GB")],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text
