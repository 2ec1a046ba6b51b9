"""Train small adapters, export the base once, switch skills on the device in milliseconds."""

from pkgutil import extend_path

# From the root of a checkout Python finds this source folder first, while the compiled
# core of a plain `pip install .` lies in site-packages. Look in both.
__path__ = extend_path(__path__, __name__)

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.errors import EdgeLoraError
from edge_lora.forms import Block, Bottleneck, Dense, LowRank, RowScale, Sparse
from edge_lora.slots import Slot, SlotTable

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
]
