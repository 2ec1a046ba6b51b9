"""Engines: what executes a bundle's graph. A new engine is one file and one row here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_lora import native
from edge_lora.bundle import Manifest, TensorSpec
from edge_lora.errors import EngineUnavailableError
from edge_lora.runtime.cache import cache_key

if TYPE_CHECKING:
    from edge_lora.native import Image

Route = Literal["packed", "unpacked", "reload"]
ROUTES: tuple[Route, ...] = ("packed", "unpacked", "reload")
Arrays = Mapping[str, NDArray[np.generic]]

ENGINES = {
    "onnxruntime": "edge_lora.runtime.engines.onnxruntime_engine",
    "executorch": "edge_lora.runtime.engines.executorch_engine",
}


class Engine(Protocol):
    """A live graph. Calls are made by one session, which does the locking."""

    route: Route
    version: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def run(self, feeds: Arrays) -> dict[str, NDArray[np.generic]]:
        """Run once; outputs are owned by the caller."""

    def run_values(self, feeds: Mapping[str, object]) -> dict[str, object]:
        """Run once on the engine's own tensors, without copies."""

    def value(self, array: NDArray[np.generic]) -> object:
        """Return the engine's own tensor over ``array``, which must stay alive."""

    def numpy(self, value: object) -> NDArray[np.generic]:
        """Return a NumPy view or copy of an engine tensor."""

    def bind(self, image: Image) -> None:
        """Tell ``image`` where each slot's weight lies.

        Raises:
            UnsupportedError: If some are not found; names them.
        """

    def replace_weights(self, weights: Arrays) -> None:
        """Rebuild with other slot weights, (out, in) fp32 (route ``reload``)."""

    def close(self) -> None:
        """Free the graph."""


def image_key(manifest: Manifest, engine: Engine) -> str:
    """Return the name of an engine's memory over a base, for what is cached about it."""
    return cache_key(
        manifest.fingerprint,
        [[n, p.offset, manifest.files[p.file].sha256] for n, p in manifest.stored.items()],
        engine.version,
        engine.route,
        native.cpu_features(),
        native.abi_version(),
    )


def open_engine(name: str, folder: Path, manifest: Manifest, route: Route, threads: int) -> Engine:
    """Open a graph with one engine on one route.

    Args:
        name: One of ``ENGINES``.
        folder: The bundle.
        manifest: As that engine sees it.
        route: How fused adapters will be switched.
        threads: Of the engine.

    Raises:
        EngineUnavailableError: If its package is not installed, or not whole.
        UnsupportedError: If the route is not possible here.
    """
    try:
        module = importlib.import_module(ENGINES[name])
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(
            f"engine {name!r} is not installed ({error.name} is missing). "
            f"Install it with: pip install 'edge-lora[{name}]'"
        ) from error
    except ImportError as error:
        raise EngineUnavailableError(
            f"engine {name!r} is installed, but cannot be loaded: {error}. "
            f"Install it anew with: pip install --force-reinstall 'edge-lora[{name}]'"
        ) from error
    engine: Engine = module.open_engine(folder, manifest, route, threads)
    return engine
