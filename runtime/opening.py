"""Open a bundle on the best route that proves itself on this device."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

from edge_lora.bundle import read_manifest
from edge_lora.bundle_engine import as_seen_by, choose_engine
from edge_lora.errors import UnknownNameError, UnsupportedError, list_all
from edge_lora.runtime.engines import ROUTES, Route
from edge_lora.runtime.foreign_program import describe_program, is_program
from edge_lora.runtime.live import Live
from edge_lora.runtime.session import Session
from edge_lora.runtime.verified import verify_once

log = logging.getLogger(__name__)


def open_bundle(
    folder: str | Path,
    engine: str = "auto",
    *,
    threads: int | None = None,
    route: Route | Literal["auto"] = "auto",
    adapter_budget_bytes: int | None = None,
) -> Session:
    """Open an exported bundle, or any ExecuTorch program.

    A program that is opened without its bundle has no digest to be compared with: ExecuTorch
    believes what it reads, and a damaged file can end the process. Open only files that you trust.

    Args:
        folder: The bundle; or a file ``.pte`` that was not exported for us, which runs, but has no
            slots for adapters.
        engine: What executes the graph: "onnxruntime", "executorch", or "auto" for the first of
            these that the bundle was exported for.
        threads: Of the engine and of swaps; default: the processors of this machine.
        route: How fused adapters are switched. "auto" takes the first of packed, unpacked, reload
            that passes its self-test here, and logs a warning if that is not packed.
        adapter_budget_bytes: Most bytes of compiled patches to keep in memory; the active and
            the newest one stay in any case. Default: no limit.

    Raises:
        BundleError: If the bundle is damaged or changed.
        EngineUnavailableError: If the engine is not installed, or the bundle has nothing for it.
        UnsupportedError: If no route works, with the reason for each.
    """
    folder = Path(folder)
    if is_program(folder):
        manifest = describe_program(folder)
    else:
        manifest = read_manifest(folder)
        verify_once(folder, manifest)
    engine = choose_engine(folder, manifest, engine)
    manifest = as_seen_by(engine, manifest)
    threads = threads or os.cpu_count() or 1
    if route not in (*ROUTES, "auto"):
        raise UnknownNameError(f"unknown route {route!r}; known: auto, {', '.join(ROUTES)}")
    possible = ROUTES if manifest.slots else ROUTES[-1:]  # without slots nothing is switched
    failures = []
    for candidate in possible if route == "auto" else (route,):
        try:
            live = Live(folder, manifest, engine, candidate, threads, adapter_budget_bytes)
        except UnsupportedError as error:
            failures.append(f"{candidate}: {error}")
            continue
        if failures:
            log.warning(
                "%s", list_all(f"route {candidate!r} is in use instead of 'packed'", failures)
            )
        return Session(folder, manifest, engine, live)
    raise UnsupportedError(list_all(f"bundle '{folder}' cannot be opened here", failures))
