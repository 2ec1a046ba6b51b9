"""Training methods: attach one to a model, train it, lower it to an adapter, take it off again.

Adding a method is one file with a class like ``edge_lora.methods.attached.Method`` and one row in
``METHODS``; its command-line choice and the generic tests follow from the row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any
from weakref import WeakSet

from torch import nn

from edge_lora.errors import EdgeLoraError, UnknownNameError, unknown_name
from edge_lora.methods.attached import Attached, BaseState, Method
from edge_lora.methods.base_slots import SlotWeight, default_slots, find_weights, slot_table
from edge_lora.methods.sites import Site, default_sites, match_sites
from edge_lora.slots import SlotTable, match_names

METHODS: dict[str, str] = {
    "biadaptformer": "edge_lora.methods.biadaptformer:BiAdaptFormer",
    "bilora": "edge_lora.methods.bilora:BiLoRA",
    "dora": "edge_lora.methods.dora:DoRA",
    "dylora": "edge_lora.methods.dylora:DyLoRA",
    "lora": "edge_lora.methods.lora:LoRA",
    "matryoshka": "edge_lora.methods.matryoshka:Matryoshka",
    "rslora": "edge_lora.methods.lora:RsLoRA",
    "shira": "edge_lora.methods.shira:SHiRA",
}
"""Method name -> module and class, imported when first used."""

_adapted: WeakSet[nn.Module] = WeakSet()


def list_methods() -> list[str]:
    """Return the names of all training methods."""
    return sorted(METHODS)


def get_method(name: str) -> type[Method]:
    """Return the class of a method.

    Raises:
        UnknownNameError: If there is no such method; lists those that are.
    """
    if name not in METHODS:
        raise UnknownNameError(unknown_name("method", name, list_methods()))
    module, _, attribute = METHODS[name].partition(":")
    method: type[Method] = getattr(import_module(module), attribute)
    return method


def attach(
    model: nn.Module,
    method: str,
    slots: Sequence[str] | None = None,
    **config: Any,  # noqa: ANN401  (fields of the method's config; checked against it)
) -> Attached:
    """Attach a training method to ``model`` in place.

    All base parameters are frozen; the trainable ones are ``attached.parameters()``.

    Args:
        model: Any torch module, on any device.
        method: One of ``list_methods()``.
        slots: Shell globs over slot names (``"*.q_proj"``), among the kinds of slots that the
            method can adapt. By default every linear slot except the output head and tied
            embeddings. Of methods that stand at sites: globs over module names (``"*.mlp"``),
            by default the modules named ``mlp``; see ``edge_lora.methods.sites``.
        **config: Fields of the method's config, such as ``density`` or ``rank``.

    Raises:
        UnknownNameError: Unknown method, config field, mask or slot pattern; lists the known ones.
        EdgeLoraError: The method refuses a slot or value, or the model is adapted already. The
            model is then unchanged.

    >>> from torch import nn
    >>> attached = attach(nn.Sequential(nn.Linear(4, 4)), "lora", rank=2)
    >>> attached.parameter_count
    16
    """
    method_class = get_method(method)
    check_options(method, config)
    settings = method_class.config_class(**config)
    if model in _adapted:
        raise EdgeLoraError("this model is adapted already. Call attached.detach() first")
    places = _places(model, method, method_class, slots)
    table = _with_sites(slot_table(model), places)
    state = BaseState.freeze(model)
    try:
        trained = method_class.attach(model, places, settings)
    except BaseException:
        state.restore()
        raise
    _adapted.add(model)

    def take_off() -> None:
        trained.restore()
        state.restore()
        _adapted.discard(model)

    return Attached(model, method, settings, table, trained, take_off)


def _places(
    model: nn.Module, method: str, method_class: type[Method], patterns: Sequence[str] | None
) -> dict[str, SlotWeight] | dict[str, Site]:
    places: dict[str, SlotWeight] | dict[str, Site]
    if "site" in method_class.kinds:
        places = default_sites(model) if patterns is None else match_sites(model, patterns)
    else:
        weights = find_weights(model)
        usable = {name: w for name, w in weights.items() if w.kind in method_class.kinds}
        if patterns is None:
            names = default_slots(model, usable)
        else:
            names = match_names(patterns, list(usable))
        places = {name: usable[name] for name in names}
    if not places:
        where = "modules named mlp" if "site" in method_class.kinds else "linear layers"
        raise UnknownNameError(
            f"method {method!r} finds no slot by default in {type(model).__name__}: "
            f"it has no {where}. Name slots with slots=[…]"
        )
    return places


def _with_sites(table: SlotTable, places: Mapping[str, SlotWeight | Site]) -> SlotTable:
    """Return the table with the sites that are used; they do not count in its fingerprint."""
    sites = [place.slot() for place in places.values() if isinstance(place, Site)]
    return SlotTable([*table.values(), *sites], table.base_id, table.fingerprint)


def check_options(method: str, names: Iterable[str]) -> None:
    """Raise UnknownNameError, with the known ones, for options that ``method`` does not have."""
    known = [f.name for f in fields(get_method(method).config_class)]
    unknown = [unknown_name(f"option of {method!r}", n, known) for n in names if n not in known]
    if unknown:
        raise UnknownNameError("\n".join(unknown))


__all__ = [
    "Attached", "attach", "check_options", "find_weights", "get_method", "list_methods",
    "slot_table",
]  # fmt: skip
