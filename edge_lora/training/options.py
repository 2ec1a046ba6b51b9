"""The options of a method that come from the run: its seed, and batches to look at beforehand."""

from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from typing import Any

from accelerate.utils import send_to_device

from edge_lora.methods import get_method
from edge_lora.methods.calibration import Batch


def run_options(
    method: str, seed: int, batches: Iterable[Batch], device: object = "cpu", count: int = 16
) -> dict[str, Any]:
    """Return ``seed`` and ``calibration`` for ``attach``, as far as the method has them.

    Args:
        method: Its name.
        seed: Of the run.
        batches: The training batches; the first ``count`` are taken for calibration.
        device: Where the model is.
        count: How many batches.
    """
    known = {field.name for field in fields(get_method(method).config_class)}
    options: dict[str, Any] = {"seed": seed} if "seed" in known else {}
    if "calibration" in known:
        taken = islice(batches, count)
        options["calibration"] = [send_to_device(batch, device) for batch in taken]
    return options
