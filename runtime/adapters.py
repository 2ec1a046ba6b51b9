"""Adapters that a session has loaded: their headers, and their patches under a byte budget."""

from __future__ import annotations

import hashlib
import json
import operator
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from edge_lora import native
from edge_lora.adapter import Adapter, BaseIdentity
from edge_lora.adapter_file import DEFAULT_DTYPE
from edge_lora.errors import (
    AdapterFileError,
    EdgeLoraError,
    UnsupportedError,
)
from edge_lora.forms import LowRank
from edge_lora.native import AdapterFile
from edge_lora.runtime.cache import cache_folder, cache_key, trim


@dataclass(frozen=True)
class SlotHeader:
    """What a header says about one slot; enough for ``SlotTable.check``."""

    shape: tuple[int, ...]
    dtype: str
    slot_hash: str
    form_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """One adapter file as the session knows it; its tensors are read again when needed.

    A thousand of them are kept beside their patches, so what they have in common is shared.

    Attributes:
        name: The name in this session.
        file: Absolute path of the file.
        method: The training method that made it.
        base: The base that it was trained on.
        deltas: Slot name -> what the adapter has for it.
        ranks: The ranks at which all of it was trained to work, ascending; none: only the whole.
        file_hash: sha256 of what the file does; its name and provenance do not count.
        rank: Which of ``ranks`` is meant; None: the whole.
    """

    name: str
    file: str
    method: str
    base: BaseIdentity
    deltas: Mapping[str, SlotHeader]
    ranks: tuple[int, ...]
    file_hash: str
    rank: int | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.file)

    @property
    def has_bottleneck(self) -> bool:
        """Whether part of it stands at sites, beside the weights."""
        return any("bottleneck" in delta.form_names for delta in self.deltas.values())

    @property
    def weights(self) -> list[str]:
        """Names of the weights that it changes: its slots that are no sites."""
        return [n for n, delta in self.deltas.items() if "bottleneck" not in delta.form_names]

    @property
    def content_hash(self) -> str:
        """``file_hash``, of this rank."""
        return self.file_hash if self.rank is None else cache_key(self.file_hash, self.rank)

    def at_rank(self, rank: int | None) -> LoadedAdapter:
        """Return the same adapter at one of its ranks.

        Raises:
            UnsupportedError: If it was not trained to work at that rank; lists those that it was.
        """
        if rank is None:
            return self
        with suppress(TypeError):  # what is no whole number is none of its ranks
            if operator.index(rank) in self.ranks:
                return replace(self, rank=int(rank))
        known = ", ".join(map(str, self.ranks)) or "none, it is of one rank: leave out rank"
        raise UnsupportedError(
            f"adapter {self.name!r} was not trained to work at rank {rank!r}; its ranks: {known}"
        )

    def open(self) -> AdapterFile:
        """Read and check the file again: what it has for weights, at this rank.

        Raises:
            AdapterFileError: If it is not the file that was loaded.
        """
        file = self._file()
        if self.has_bottleneck:
            file = _only(self.weights, Adapter.load(self.path))
        return file if self.rank is None else file.at_rank(self.rank)

    def read(self) -> Adapter:
        """Return the whole adapter as arrays, at this rank.

        Raises:
            AdapterFileError: If it is not the file that was loaded.
        """
        self._file()
        adapter = Adapter.load(self.path)
        return adapter if self.rank is None else _at_rank(adapter, self.rank)

    def _file(self) -> AdapterFile:
        file = read_file(self.path)
        if _file_hash(json.loads(file.header)) != self.file_hash:
            raise AdapterFileError(
                f"adapter file '{self.path}' changed since it was loaded as {self.name!r}; "
                "delete that adapter and load the file again"
            )
        return file


Parts = Sequence[tuple[LoadedAdapter, float]]
"""Adapters and their weights; empty is the base."""


def _only(slots: Sequence[str], adapter: Adapter) -> AdapterFile:
    """Return the file of a part of ``adapter``; the core refuses to compile bottlenecks."""
    part = replace(adapter, deltas={name: adapter.deltas[name] for name in slots})
    with tempfile.TemporaryDirectory(prefix="edge-lora-") as folder:
        return read_file(part.save(Path(folder) / "weights.safetensors"))


def _at_rank(adapter: Adapter, rank: int) -> Adapter:
    deltas = {}
    for slot, delta in adapter.deltas.items():
        forms = tuple(f.at_rank(rank) if isinstance(f, LowRank) else f for f in delta.forms)
        deltas[slot] = replace(delta, forms=forms)
    return replace(adapter, deltas=deltas)


def load(path: Path, name: str | None = None) -> LoadedAdapter:
    """Read and check one adapter file; ``name`` is by default the one in the file."""
    header = json.loads(read_file(path).header)
    return LoadedAdapter(
        name or str(header["name"]),
        str(path),
        sys.intern(str(header["method"])),
        _base(header["base"]["sha256"], header["base"].get("id", "")),
        _deltas(tuple((slot, _slot_header(entry)) for slot, entry in header["slots"].items())),
        _ranks(header),
        _file_hash(header),
    )


@lru_cache(maxsize=256)
def _base(fingerprint: str, name: str) -> BaseIdentity:
    """Return one object for all adapters of a base."""
    return BaseIdentity(fingerprint, name)


@lru_cache(maxsize=256)
def _deltas(entries: tuple[tuple[str, SlotHeader], ...]) -> Mapping[str, SlotHeader]:
    """Return one mapping for all adapters that are alike."""
    return MappingProxyType(dict(entries))


def _slot_header(entry: Mapping[str, Any]) -> SlotHeader:
    return SlotHeader(
        tuple(entry["shape"]),
        entry.get("dtype", DEFAULT_DTYPE),
        entry.get("hash", ""),
        tuple(form["form"] for form in entry["forms"]),
    )


def _ranks(header: Mapping[str, Any]) -> tuple[int, ...]:
    nested = [
        set(form.get("ranks", ()))
        for entry in header["slots"].values()
        for form in entry["forms"]
        if form["form"] == "low_rank"
    ]
    return tuple(sorted(set.intersection(*nested))) if nested else ()


def _file_hash(header: Mapping[str, Any]) -> str:
    counted = {k: header[k] for k in ("base", "alpha", "slots", "tensors_sha256")}
    counted["codebooks"] = header.get("codebooks", [])
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def unbound(adapter: LoadedAdapter, base_id: str) -> str:
    """Return the warning for an adapter that names no base."""
    return (
        f"adapter {adapter.name!r} does not say on which base it was trained: its slots fit "
        f"{base_id!r}, nothing else was checked. Bind it to its base once with: "
        "edge-lora convert FILE OUT --base BUNDLE"
    )


def read_file(path: Path) -> AdapterFile:
    """Open one adapter file in the core, with the path in every error."""
    if not path.exists():
        raise AdapterFileError(f"adapter file '{path}' does not exist")
    try:
        return native.AdapterFile(str(path))
    except EdgeLoraError as error:
        text = str(error)
        message = text if str(path) in text else f"adapter file '{path}': {text}"
        raise AdapterFileError(message) from error


class Compiled(Protocol):
    """One adapter, or a weighted sum of them, made ready for one image."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""

    def save(self, path: str) -> None:
        """Write to a cache file, atomically."""


Compiled_co = TypeVar("Compiled_co", bound=Compiled, covariant=True)
Opened = TypeVar("Opened")
Made = TypeVar("Made", bound=Compiled)


class Compiler(Protocol[Opened, Compiled_co]):
    """What makes patches of adapters that were opened."""

    def compile(self, parts: list[tuple[Opened, float]]) -> Compiled_co:
        """Compile a weighted sum of adapters."""

    def load_patch(self, path: str) -> Compiled_co:
        """Read what a patch saved; raises EdgeLoraError if it is damaged."""


@dataclass(slots=True)
class _Kept(Generic[Made]):
    """One patch of a pool.

    Attributes:
        patch: The patch.
        nbytes: Its size when it came.
        hashes: File hashes of the adapters in it.
    """

    patch: Made
    nbytes: int
    hashes: tuple[str, ...]


class PatchPool(Generic[Opened, Made]):
    """Compiled patches, least recently used out first, under a byte budget.

    The newest one and the pinned one stay whatever they take.

    A patch that was dropped comes back from the user's cache folder, or is compiled again.
    """

    def __init__(
        self,
        image: Compiler[Opened, Made],
        image_key: str,
        budget_bytes: int | None,
        opened: Callable[[LoadedAdapter], Opened],
    ) -> None:
        """Keep patches for ``image``, whose layout and content ``image_key`` names.

        ``opened`` reads an adapter again, for the compiler.
        """
        self._image, self._image_key, self._budget = image, image_key, budget_bytes
        self._opened = opened
        self._kept: dict[str, _Kept[Made]] = {}  # in order of last use
        self._passing: set[str] = set()  # scaled and composed: kept only while they are in use
        self._nbytes = 0
        self._pinned = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all patches held."""
        return self._nbytes

    def key(self, parts: Parts) -> str:
        """Return the cache key of a weighted sum of adapters on this image."""
        return cache_key(self._image_key, [(a.content_hash, weight) for a, weight in parts])

    def get(self, parts: Parts) -> Made:
        """Return the patch for a weighted sum of adapters, from memory, disk or the compiler."""
        key = self.key(parts)
        kept = self._kept.pop(key, None)
        if kept is None:
            patch = self._from_disk(key) or self._compile(key, parts)
            hashes = tuple(adapter.file_hash for adapter, _ in parts)
            kept = _Kept(patch, patch.nbytes, hashes)
            self._nbytes += kept.nbytes
            if [weight for _, weight in parts] != [1.0]:
                self._passing.add(key)
        self._kept[key] = kept
        self._shrink()
        return kept.patch

    def pin(self, parts: Parts) -> None:
        """Keep the patch of ``parts`` (none: of nothing), instead of the one pinned before."""
        self._pinned = self.key(parts) if parts else ""
        self._shrink()

    def drop(self, adapter: LoadedAdapter) -> None:
        """Forget every patch with ``adapter`` in it, at any rank; the pinned one and files stay."""
        for key in [k for k, kept in self._kept.items() if adapter.file_hash in kept.hashes]:
            if key != self._pinned:
                self._forget(key)

    def _forget(self, key: str) -> None:
        self._nbytes -= self._kept.pop(key).nbytes
        self._passing.discard(key)

    def _from_disk(self, key: str) -> Made | None:
        path = cache_folder("patches") / key
        if not path.is_file():
            return None
        try:
            patch = self._image.load_patch(str(path))
            path.touch()
            return patch
        except (EdgeLoraError, OSError):  # damaged or from another build: make it anew
            path.unlink(missing_ok=True)
            return None

    def _compile(self, key: str, parts: Parts) -> Made:
        patch = self._image.compile([(self._opened(adapter), weight) for adapter, weight in parts])
        folder = cache_folder("patches")
        try:
            patch.save(str(folder / key))
            trim(folder)
        except (EdgeLoraError, OSError):
            pass  # a full disk costs a compilation next time, nothing else
        return patch

    def _shrink(self) -> None:
        """Drop what is over the budget; costs nothing where all fits, however many there are."""
        stay = {next(reversed(self._kept), ""), self._pinned}
        for key in self._passing - stay:
            self._forget(key)
        if self._budget is None or self._nbytes <= self._budget:
            return
        for key in [key for key in self._kept if key not in stay]:
            if self._nbytes <= self._budget:
                return
            self._forget(key)
