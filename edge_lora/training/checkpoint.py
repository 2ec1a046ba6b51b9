"""Checkpoints of a run: one file, written atomically, enough to go on as if never stopped."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_lora.errors import UnsupportedError

FILE_NAME = "checkpoint.pt"
FORMAT_VERSION = 1


def random_state() -> dict[str, Any]:
    """Return the state of every random generator that training may use."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  (other people's code uses it)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back where ``random_state`` found them."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``folder/checkpoint.pt``; a killed process leaves the old file or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"version": FORMAT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Return the checkpoint in ``folder``, or None if there is none.

    Args:
        folder: Where ``save_checkpoint`` wrote.
        run: What the new session was asked to do; must equal what the checkpoint was made by.

    Raises:
        UnsupportedError: The file is damaged, or belongs to another run; lists the differences.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:  # weights_only: a checkpoint cannot run code
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version, saved = state["version"], state["run"]
    except Exception as error:
        raise UnsupportedError(
            f"checkpoint {str(path)!r} cannot be read ({error}). Remove it to start again"
        ) from error
    if version != FORMAT_VERSION:
        raise UnsupportedError(
            f"checkpoint {str(path)!r} has format {version}, not {FORMAT_VERSION}"
        )
    differences = [
        f"{key} was {saved.get(key)!r}, now {run.get(key)!r}"
        for key in run.keys() | saved.keys()
        if saved.get(key) != run.get(key)
    ]
    if differences:
        raise UnsupportedError(
            f"checkpoint {str(path)!r} is of another run: {'; '.join(sorted(differences))}. "
            "Use another folder, or resume=False"
        )
    return state
