"""The bundle's tokenizer."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from edge_lora.errors import BundleError, EngineUnavailableError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@lru_cache(maxsize=4)
def tokenizer_of(folder: Path) -> Tokenizer:
    """Return the tokenizer that was exported with the base.

    Raises:
        BundleError: If the bundle has none.
        EngineUnavailableError: If the ``tokenizers`` package is not installed.
    """
    path = folder / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        raise BundleError(
            f"bundle '{folder}' has no tokenizer; give token ids to "
            "edge_lora.runtime.generate.generate(), or export again with tokenizer=…"
        )
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(
            "text needs the package tokenizers. Install it with: pip install tokenizers"
        ) from error
    return Tokenizer.from_file(str(path))
