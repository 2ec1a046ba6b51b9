"""Scenario sets from a stranger: one error that lists everything, and nothing is taken over."""

import json
import os

import numpy as np
import pytest

from edge_lora.errors import BundleError
from edge_lora.scenario_classifier import Classifier, WindowFeatures
from edge_lora.scenarios import MANIFEST, read_scenarios, write_scenarios


@pytest.fixture
def folder(tmp_path):
    """Return a sound set; its adapters are some bytes, which this reader only hashes."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(name.encode() * 40)
    features = WindowFeatures(16, 4)
    count = features.count
    layers = ((np.ones((count, 2), np.float32), np.zeros(2, np.float32)),)
    one = Classifier(features, np.zeros(count, np.float32), np.ones(count, np.float32), layers)
    files = [("calm", "a.safetensors"), ("storm", "b.safetensors")]
    write_scenarios(folder, files, one, ("some-base", "f" * 64), "calm")
    return folder


def change(folder, edit):
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_a_sound_set_is_read(folder):
    found = read_scenarios(folder)
    assert found.names == ("calm", "storm")
    assert found.default == "calm"
    assert (found.base_id, found.fingerprint) == ("some-base", "f" * 64)
    assert found.classifier.features == WindowFeatures(16, 4)
    change(folder, lambda d: d.update(default="storm"))
    assert read_scenarios(folder).sha256 != found.sha256


def first(document):
    return document["conditions"][0]


CASES = {
    "version": (lambda d: d.update(edge_lora_scenarios=[2, 0]), r"format version \[2, 0\]"),
    "no version": (lambda d: d.pop("edge_lora_scenarios"), "format version None"),
    "unknown key": (lambda d: d.update(run="x"), r"unknown keys \['run'\]"),
    "outside": (lambda d: first(d).update(file="../a.safetensors"), "lies outside the set"),
    "absolute": (lambda d: first(d).update(file="/etc/passwd"), "lies outside the set"),
    "backslash": (lambda d: first(d).update(file="..\\a"), "lies outside the set"),
    "no such file": (lambda d: first(d).update(file="c"), "c is missing or not a plain file"),
    "a folder": (lambda d: first(d).update(file="."), "is missing or not a plain file"),
    "hash": (lambda d: first(d).update(sha256="0" * 64), r"a\.safetensors has sha256"),
    "no hash": (lambda d: first(d).update(sha256="x"), "must be 64 hex digits"),
    "size": (lambda d: first(d).update(size=41), r"has 40 bytes, scenarios\.json says 41"),
    "twice": (lambda d: first(d).update(name="storm"), "condition 'storm' comes 2 times"),
    "auto": (lambda d: first(d).update(name="auto"), "condition 'auto'"),
    "control": (lambda d: first(d).update(name="a\nb"), "printable characters"),
    "nameless": (lambda d: first(d).update(name=""), "must be a text that is not empty"),
    "one only": (lambda d: d["conditions"].pop(), "1 conditions; a set has 2 to 64"),
    "no list": (lambda d: d.update(conditions={"a": 1}), "must be a list"),
    "too many": (lambda d: d.update(conditions=d["conditions"] * 40), "80 conditions"),
    "default": (lambda d: d.update(default="rain"), "must be one of calm, storm"),
    "fingerprint": (lambda d: d["base"].update(fingerprint=3), "'fingerprint' is 3"),
    "window": (lambda d: d["classifier"]["features"].update(window=0), "'window' is 0"),
    "huge": (lambda d: d["classifier"]["features"].update(window=10**9), "whole number from 1"),
    "true": (lambda d: d["classifier"]["features"].update(season=True), "'season' is True"),
    "kind": (lambda d: d["classifier"]["features"].update(kind="fft"), "must be one of season"),
    "shape": (lambda d: d["classifier"]["features"].update(window=24), r"weight0 is float32 \("),
    "third": (
        lambda d: d["conditions"].append({**first(d), "name": "c"}),
        r"bias0 is float32 \(2,\), must be float32 \(3,\)",
    ),
}


@pytest.mark.parametrize(("edit", "message"), CASES.values(), ids=CASES)
def test_a_manifest_that_is_not_as_it_must_be(folder, edit, message):
    change(folder, edit)
    with pytest.raises(BundleError, match=message) as error:
        read_scenarios(folder)
    assert str(folder) in str(error.value)


def test_everything_wrong_is_in_one_message(folder):
    def edit(document):
        first(document).update(sha256="0" * 64)
        document.update(default="rain")
        document["classifier"]["features"].update(season=0)

    change(folder, edit)
    (folder / "b.safetensors").unlink()
    with pytest.raises(BundleError) as error:
        read_scenarios(folder)
    for message in (
        "a.safetensors has sha256",
        "b.safetensors is missing",
        "rain",
        "'season' is 0",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "\0", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": NaN}', '{"a": "\ud800"}'],
)
def test_what_is_no_manifest(folder, text):
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BundleError, match="scenario set"):
        read_scenarios(folder)


def test_a_condition_named_twice_by_json_is_refused(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"name": "calm"', '"name": "calm", "name": "x"'))
    with pytest.raises(BundleError, match="duplicate keys"):
        read_scenarios(folder)


def test_a_link_out_of_the_folder_is_no_file_of_the_set(folder, tmp_path):
    outside = tmp_path / "outside"
    (folder / "a.safetensors").rename(outside)
    os.symlink(outside, folder / "a.safetensors")
    with pytest.raises(BundleError, match=r"a\.safetensors is missing or not a plain file"):
        read_scenarios(folder)


def test_a_huge_manifest_is_not_read(folder):
    with (folder / MANIFEST).open("ab") as file:
        file.truncate(2 << 20)
    with pytest.raises(BundleError, match="over 1048576"):
        read_scenarios(folder)


def test_what_is_no_set(tmp_path):
    with pytest.raises(BundleError, match=r"no scenarios\.json. Make one with: edge-lora train"):
        read_scenarios(tmp_path)
