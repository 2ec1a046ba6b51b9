"""Train small adapters, export the base once, switch skills on the device in milliseconds."""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING

# From the root of a checkout Python finds this source folder first, while the compiled
# core of a plain `pip install .` lies in site-packages. Look in both.
__path__ = extend_path(__path__, __name__)

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.errors import EdgeLoraError
from edge_lora.forms import Block, Bottleneck, Dense, LowRank, RowScale, Sparse
from edge_lora.slots import Slot, SlotTable

if TYPE_CHECKING:
    from edge_lora.interop.peft import from_peft
    from edge_lora.interop.peft_export import to_peft

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "BaseIdentity",
    "Block",
    "Bottleneck",
    "Delta",
    "Dense",
    "EdgeLoraError",
    "LowRank",
    "RowScale",
    "Slot",
    "SlotTable",
    "Sparse",
    "__version__",
    "from_peft",
    "to_peft",
]

_LAZY = {"from_peft": "edge_lora.interop.peft", "to_peft": "edge_lora.interop.peft_export"}


def __getattr__(name: str) -> object:
    """Import a reader or writer of other people's files when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'edge_lora' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
