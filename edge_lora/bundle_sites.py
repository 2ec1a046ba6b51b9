"""The part of the manifest about sites: which graph inputs feed the bottleneck of each.

A site's branch adds ``act(x @ down_in + y @ down_out + down_bias) @ up + up_bias`` to y, where x
is what the site reads and y its output. The middle units lie in the order of ``ACTIVATIONS``;
``units`` says how many there are of each. None of it is computed unless ``switch`` is 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from edge_lora.bundle_fields import axes, mapping, member, refuse, require_keys, text
from edge_lora.errors import BundleError
from edge_lora.forms import VALUE_DTYPES, Activation
from edge_lora.slots import Slot

ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "gelu", "gelu_tanh")
"""The order of a branch's middle units."""


@dataclass(frozen=True)
class SiteInputs:
    """Names of the optional graph inputs of one site.

    Attributes:
        down_in: (d_in, r), reads x. (d_in, 1) of zeros where no unit reads x.
        down_out: (d_out, r), reads y. (d_out, 1) of zeros where no unit reads y.
        down_bias: (r,).
        units: (4,) int64, how many units have each of ``ACTIVATIONS``.
        up: (r, d_out).
        up_bias: (d_out,).
        switch: (1,) int64, shared by all sites; 0 by default: the graph computes the base.
    """

    down_in: str
    down_out: str
    down_bias: str
    units: str
    up: str
    up_bias: str
    switch: str


@dataclass(frozen=True)
class BundleSite:
    """What the manifest says of one site beside its slot."""

    inputs: SiteInputs


def site_record(slot: Slot, site: BundleSite) -> dict[str, Any]:
    """Return the manifest's record of one site."""
    return {
        "name": slot.name,
        "shape": list(slot.shape),
        "dtype": slot.dtype,
        **asdict(site),
    }


def read_site(value: object, index: int) -> tuple[Slot, BundleSite]:
    """Return one site of a stranger's manifest.

    Args:
        value: Its record.
        index: Where it stands in the list, for messages.

    Raises:
        BundleError: If a field is missing or not what it must be.
    """
    where = f"site {index}"
    record = mapping(value, "record", where)
    name = text(member(record, "name", where), "name", where)
    where = f"site {name}"
    require_keys(record, ("name", "shape", "dtype", "inputs"), where)
    shape = axes(member(record, "shape", where), "shape", where, least=1)
    if len(shape) != 2:
        raise refuse(where, "shape", record["shape"], "two widths, output and input")
    dtype = text(member(record, "dtype", where), "dtype", where, VALUE_DTYPES)
    slot = Slot(name, shape, dtype, "", "site")
    inputs = _read_inputs(mapping(member(record, "inputs", where), "inputs", where), where)
    return slot, BundleSite(inputs)


def _read_inputs(record: dict[str, Any], where: str) -> SiteInputs:
    names = [f.name for f in fields(SiteInputs)]
    require_keys(record, names, where)
    inputs = SiteInputs(**{n: text(member(record, n, where), n, where) for n in names})
    if len(set(asdict(inputs).values())) != len(names):
        raise BundleError(f"{where}: two of its 'inputs' have one name")
    return inputs
