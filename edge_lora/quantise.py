"""Post-training quantisation: any adapter with values of 1, 2, 4 or 8 bits.

Every value field of every form is coded, with these exceptions, which stay as they are:

* RowScale and the biases of a Bottleneck: one value a row, a sliver of the file, and each is a gain
  or an offset of a whole output;
* a field that would not become smaller, or that has as few bits already.

Both factors of a LowRank are coded together (``edge_lora.factor_codes``), unless it was trained to
work at smaller ranks too: each of its rows must stay what it is.

Indices are exact in any case. What it costs: ``edge_lora.slot_errors``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_lora import codebook
from edge_lora.adapter import Adapter
from edge_lora.codebook import Book, Coded, Group
from edge_lora.factor_codes import encode_pair
from edge_lora.forms import Form, LowRank, RowScale, Values, to_array, values_of

EXACT_FIELDS = ("down_bias", "up_bias")


def quantise(
    adapter: Adapter, bits: int, group: Group = "tensor", book: Book = "gauss_l1"
) -> Adapter:
    """Return the adapter with coded values.

    Args:
        adapter: Any; not modified.
        bits: 1, 2, 4 or 8.
        group: What shares a mean and a spread: "tensor", "row", or that many values.
        book: "gauss_l1" for the least absolute error, "lloyd_max" for the least squared error.

    Raises:
        UnsupportedError: Other bits or a group below 1.
        UnknownNameError: Another book.
    """
    codebook.levels_of(book, bits)  # refuse before any work, and where nothing would be coded

    def coded(form: Form) -> Form:
        if isinstance(form, RowScale):
            return form
        fields: dict[str, Any] = {
            name: _smaller(values, bits, group, book)
            for name, values in values_of(form).items()
            if name not in EXACT_FIELDS
        }
        return _together(form, replace(form, **fields), bits, group, book)

    deltas = {
        slot: replace(delta, forms=tuple(map(coded, delta.forms)))
        for slot, delta in adapter.deltas.items()
    }
    recipe = {"bits": bits, "group": group, "book": book}
    return replace(adapter, deltas=deltas, provenance={**adapter.provenance, "quantised": recipe})


def _smaller(values: Values, bits: int, group: Group, book: Book) -> Values:
    if isinstance(values, Coded) and values.bits <= bits:
        return values
    found = codebook.encode(to_array(values), bits, group, book)
    return found if found.nbytes < values.nbytes else values


def _together(form: Form, coded: Form, bits: int, group: Group, book: Book) -> Form:
    """Return ``coded``, its factors coded with regard to each other where that may be done."""
    if not isinstance(form, LowRank) or not isinstance(coded, LowRank) or form.ranks:
        return coded
    if coded.a is form.a or coded.bt is form.bt:  # one of them stays as it is
        return coded
    a, bt = encode_pair(to_array(form.a), to_array(form.bt), bits, group, book)
    return replace(coded, a=a, bt=bt)
