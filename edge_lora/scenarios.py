"""Scenario sets: one adapter per condition, and a small classifier that picks one per window.

A set is a folder::

    scenarios.json            this module
    adapter-00.safetensors    an adapter; several conditions may share one
    classifier.safetensors    see ``edge_lora.scenario_classifier``

The idea of choosing an adapter by a small classifier of the input is that of noise-scenario sets
for audio-visual speech recognition; features, classifier and format are this project's own.

The folder comes from outside: everything wrong with it is listed in one error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edge_lora.adapter import AUTO
from edge_lora.atomic import replacing
from edge_lora.bundle import hash_file
from edge_lora.bundle_fields import (
    collect,
    digest,
    mapping,
    member,
    natural,
    require_keys,
    sequence,
    text,
)
from edge_lora.errors import BundleError, EdgeLoraError, list_all
from edge_lora.scenario_classifier import (
    MOST_ROWS,
    Classifier,
    WindowFeatures,
    read_classifier,
    write_classifier,
)
from edge_lora.strict_json import parse_strict

FORMAT_VERSION = (1, 0)
MANIFEST = "scenarios.json"
CLASSIFIER = "classifier.safetensors"
MOST_CONDITIONS = 64
MAX_MANIFEST_BYTES = 1 << 20
_KEY = "edge_lora_scenarios"


@dataclass(frozen=True)
class SetFile:
    """One file of a set.

    Attributes:
        file: Path inside the folder.
        size: In bytes.
        sha256: Hash of its bytes, hex.
    """

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Condition:
    """One condition of a set.

    Attributes:
        name: Of the condition, and of its adapter in a session.
        adapter: Its adapter file.
    """

    name: str
    adapter: SetFile


@dataclass(frozen=True, eq=False)
class ScenarioSet:
    """A set as it was read, every file checked against its hash.

    Attributes:
        folder: Where it lies.
        base_id: Readable name of the base.
        fingerprint: Of the base.
        conditions: At least two, each name once, in the order of the classifier's outputs.
        default: The condition for windows that cannot be judged, and before the first run.
        input: The graph's input whose windows are judged.
        classifier: Picks a condition per window.
        sha256: Of the manifest's bytes, which name every file by its hash.
    """

    folder: Path
    base_id: str
    fingerprint: str
    conditions: tuple[Condition, ...]
    default: str
    input: str
    classifier: Classifier
    sha256: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the conditions."""
        return tuple(condition.name for condition in self.conditions)


def write_scenarios(
    folder: Path,
    adapters: Sequence[tuple[str, str]],
    classifier: Classifier,
    base: tuple[str, str],
    default: str,
    input_name: str = "x",
) -> Path:
    """Write classifier and manifest beside the adapter files, which are there already.

    Args:
        folder: An existing folder.
        adapters: Condition -> file in ``folder``, in the order of the classifier's outputs.
        classifier: Of as many conditions.
        base: Readable name and fingerprint of the adapters' base.
        default: One of the conditions.
        input_name: The graph's input whose windows are judged.

    Returns:
        The manifest's path; it is written last, so that a set is whole or is none.
    """
    write_classifier(classifier, folder / CLASSIFIER)
    document = {
        _KEY: list(FORMAT_VERSION),
        "base": {"id": base[0], "fingerprint": base[1]},
        "conditions": [{"name": name, **_record(folder, file)} for name, file in adapters],
        "default": default,
        "classifier": {
            **_record(folder, CLASSIFIER),
            "input": input_name,
            "features": {"kind": WindowFeatures.KIND, **asdict(classifier.features)},
        },
    }
    path = folder / MANIFEST
    with replacing(path) as part:
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def read_scenarios(folder: str | Path) -> ScenarioSet:
    """Read a set and compare every file with its hash.

    Raises:
        BundleError: If anything is missing, changed, damaged or not as it must be; lists all.
    """
    folder = Path(folder)
    raw, sha256 = _read_json(folder)
    problems: list[str] = []
    conditions = _read_conditions(raw.get("conditions"), problems)
    names = [condition.name for condition in conditions]
    base = collect(problems, _read_base, raw.get("base")) or ("", "")
    default = collect(problems, text, raw.get("default"), "default", MANIFEST, names) or ""
    head = collect(problems, _read_classifier_head, raw.get("classifier"))
    collect(problems, require_keys, raw, _KNOWN, MANIFEST)
    files = {condition.adapter for condition in conditions} | ({head[0]} if head else set())
    for file in sorted(files, key=lambda record: record.file):
        problems += _problem_of(folder, file)
    classifier = None
    if head and not _problem_of(folder, head[0]):
        try:
            classifier = read_classifier(folder / head[0].file, head[2], len(conditions))
        except EdgeLoraError as error:
            problems.append(str(error))
    if problems or head is None or classifier is None:
        raise BundleError(list_all(f"scenario set '{folder}' is damaged", problems))
    return ScenarioSet(folder, *base, tuple(conditions), default, head[1], classifier, sha256)


_KNOWN = (_KEY, "base", "conditions", "default", "classifier")


def _record(folder: Path, file: str) -> dict[str, Any]:
    found = hash_file(folder / file)
    return asdict(SetFile(file, found.size, found.sha256))


def _read_json(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"'{folder}' is not a scenario set: no {MANIFEST}. Make one with: "
            "edge-lora train --task forecast --condition hour -o DIR"
        )
    try:
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{size} bytes, over {MAX_MANIFEST_BYTES}")
        data = path.read_bytes()
        raw = parse_strict(data)
    except (OSError, EdgeLoraError) as error:
        raise BundleError(f"scenario set '{folder}': {MANIFEST}: {error}") from error
    version = raw.get(_KEY) if isinstance(raw, dict) else None
    if not isinstance(version, list) or version[:1] != [FORMAT_VERSION[0]]:
        raise BundleError(
            f"scenario set '{folder}': {MANIFEST} has format version {version!r:.60}, this reader "
            f"knows {FORMAT_VERSION[0]}.x. Train it again, or install a newer edge-lora"
        )
    assert isinstance(raw, dict)
    return raw, hashlib.sha256(data).hexdigest()


def _read_base(value: object) -> tuple[str, str]:
    base = mapping(value, "base", MANIFEST)
    require_keys(base, ("id", "fingerprint"), "base")
    return (
        text(member(base, "id", "base"), "id", "base"),
        digest(member(base, "fingerprint", "base"), "fingerprint", "base"),
    )


def _read_conditions(value: object, problems: list[str]) -> list[Condition]:
    records = collect(problems, sequence, value, "conditions", MANIFEST) or []
    if not 2 <= len(records) <= MOST_CONDITIONS:
        problems.append(f"{len(records)} conditions; a set has 2 to {MOST_CONDITIONS}")
        records = records[:MOST_CONDITIONS]
    found = [collect(problems, _read_condition, r, i) for i, r in enumerate(records)]
    conditions = [condition for condition in found if condition is not None]
    names = [condition.name for condition in conditions]
    problems += [
        f"condition {name!r} comes {names.count(name)} times"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    return conditions


def _read_condition(value: object, index: int) -> Condition:
    where = f"condition {index}"
    record = mapping(value, "record", where)
    require_keys(record, ("name", "file", "size", "sha256"), where)
    return Condition(condition_name(member(record, "name", where)), _read_file(record, where))


def condition_name(value: object) -> str:
    """Return ``value`` if it can name a condition.

    Raises:
        BundleError: If it is no text, empty, "auto", over 100 characters or has control characters.
    """
    name = text(value, "name", "condition")
    if name == AUTO or len(name) > 100 or not name.isprintable():
        raise BundleError(
            f"condition {name!a:.60}: its name must be at most 100 printable characters and not "
            f"{AUTO!r}, which asks a session to choose"
        )
    return name


def _read_file(record: dict[str, Any], where: str) -> SetFile:
    name = text(member(record, "file", where), "file", where)
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise BundleError(f"{where}: file {name!a:.60} lies outside the set")
    return SetFile(
        name,
        natural(member(record, "size", where), "size", where),
        digest(member(record, "sha256", where), "sha256", where),
    )


def _read_classifier_head(value: object) -> tuple[SetFile, str, WindowFeatures]:
    where = "classifier"
    record = mapping(value, where, MANIFEST)
    require_keys(record, ("file", "size", "sha256", "input", "features"), where)
    features = mapping(member(record, "features", where), "features", where)
    require_keys(features, ("kind", "window", "season"), "features")
    text(member(features, "kind", "features"), "kind", "features", (WindowFeatures.KIND,))
    window, season = (
        natural(member(features, key, "features"), key, "features", 1, MOST_ROWS)
        for key in ("window", "season")
    )
    return (
        _read_file(record, where),
        text(member(record, "input", where), "input", where),
        WindowFeatures(window, season),
    )


def _problem_of(folder: Path, expected: SetFile) -> list[str]:
    """Compare one file with its record; a link out of the folder is no file of the set."""
    path = folder.resolve() / expected.file
    if not path.is_file() or path.resolve() != path:
        return [f"{expected.file} is missing or not a plain file"]
    if path.stat().st_size != expected.size:
        return [f"{expected.file} has {path.stat().st_size} bytes, {MANIFEST} says {expected.size}"]
    found = hash_file(path).sha256
    if found != expected.sha256:
        return [
            f"{expected.file} has sha256 {found[:12]}…, {MANIFEST} says {expected.sha256[:12]}…"
        ]
    return []
