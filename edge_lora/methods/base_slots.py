"""The slots of a torch model: which weights adapters may change, and the fingerprint of the base.

The exporter and every training method call ``find_weights`` and ``slot_table``, so both sides of
the project agree on names, shapes and hashes. Nothing here knows what a method is.

A slot is the weight of a ``Linear``, ``Conv1d``, ``Conv2d``, ``Embedding`` or transformers
``Conv1D`` module. transformers' Conv1D stores (in_features, out_features); its slot is the
transpose, so that every linear slot reads (out_features, in_features). Tied weights are one slot
under the first name that ``named_parameters`` yields; the other names are its aliases.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.slots import Slot, SlotKind, SlotTable

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""safetensors' names of the dtypes that a slot may have."""

_HASH_CHUNK_BYTES = 1 << 26  # one copy to the host at a time: 64 MiB, whatever the model's size
_HEAD_GETTER = "get_output_embeddings"  # transformers' name for "the layer that makes logits"


@dataclass(frozen=True, eq=False)
class SlotWeight:
    """Where a slot lives in a torch model.

    Attributes:
        name: The slot's name.
        parameter: The tensor, as the module stores it.
        modules: Every module that reads it (more than one if tied).
        kind: What the first of them does with it.
        is_transposed: True if the module stores (in_features, out_features).
        aliases: Other names of the same parameter.
    """

    name: str
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...]
    kind: SlotKind
    is_transposed: bool
    aliases: tuple[str, ...] = ()

    @property
    def tensor(self) -> Tensor:
        """The weight in the slot's orientation: a detached view of the model's memory."""
        weight = self.parameter.detach()
        return weight.t() if self.is_transposed else weight

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slot, (out_features, in_features, …)."""
        return tuple(self.tensor.shape)

    @property
    def matrix(self) -> Tensor:
        """``tensor`` as (out_features, everything else)."""
        return self.tensor.flatten(1)


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Return True for transformers' Conv1D, recognised without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _kind_of(module: nn.Module) -> SlotKind | None:
    if isinstance(module, nn.Linear) or is_transformers_conv1d(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "conv"
    return None


def find_weights(model: nn.Module) -> dict[str, SlotWeight]:
    """Return every slot weight of ``model`` by name, in the model's order; reads no data.

    Raises:
        UnsupportedError: If a weight is not fp32, fp16 or bf16; lists all such weights.
    """
    found: dict[int, SlotWeight] = {}
    problems: list[str] = []
    for module_name, module in model.named_modules(remove_duplicate=False):
        kind = _kind_of(module)
        weight = getattr(module, "weight", None)
        if kind is None or not isinstance(weight, nn.Parameter):
            continue
        name = f"{module_name}.weight" if module_name else "weight"
        seen = found.get(id(weight))
        if seen is not None:
            modules = seen.modules if module in seen.modules else (*seen.modules, module)
            found[id(weight)] = replace(seen, modules=modules, aliases=(*seen.aliases, name))
            continue
        if weight.dtype not in DTYPE_NAMES:
            problems.append(f"{name} is {weight.dtype}, must be fp32, fp16 or bf16")
        found[id(weight)] = SlotWeight(
            name, weight, (module,), kind, is_transposed=is_transformers_conv1d(module)
        )
    if problems:
        raise UnsupportedError(list_all("weights of an unsupported dtype", problems))
    return {weight.name: weight for weight in found.values()}


def find_others(model: nn.Module) -> dict[str, SlotWeight]:
    """Return the parameters that ``find_weights`` leaves out (biases, norms) by name.

    They are slots only where somebody names them, and never count in the base's fingerprint.
    """
    base = {id(weight.parameter) for weight in find_weights(model).values()}
    found: dict[int, SlotWeight] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in base or parameter.dtype not in DTYPE_NAMES or not parameter.ndim:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        if id(parameter) in found:
            seen = found[id(parameter)]
            modules = seen.modules if module in seen.modules else (*seen.modules, module)
            found[id(parameter)] = replace(seen, modules=modules, aliases=(*seen.aliases, name))
        else:
            found[id(parameter)] = SlotWeight(
                name, parameter, (module,), "other", is_transposed=False
            )
    return {weight.name: weight for weight in found.values()}


def _byte_chunks(weight: Tensor) -> Iterator[bytes]:
    """Yield the bytes of ``weight``, row-major in its shape, without a second copy of all of it."""
    rows = max(1, _HASH_CHUNK_BYTES // max(1, weight[:1].numel() * weight.element_size()))
    for chunk in torch.split(weight, rows):
        yield chunk.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def hash_weight(weight: Tensor) -> str:
    """Return the sha256 (hex) of a tensor's bytes, little-endian and row-major in its own shape."""
    digest = hashlib.sha256()
    for chunk in _byte_chunks(weight):
        digest.update(chunk)
    return digest.hexdigest()


def slot_of(weight: SlotWeight) -> Slot:
    """Return the slot of a weight; reads and hashes its bytes."""
    return Slot(
        name=weight.name,
        shape=weight.shape,
        dtype=DTYPE_NAMES[weight.parameter.dtype],
        sha256=hash_weight(weight.tensor),
        kind=weight.kind,
        aliases=weight.aliases,
    )


def slot_table(model: nn.Module, base_id: str = "") -> SlotTable:
    """Return all slots of ``model``; the fingerprint covers every one of them.

    Args:
        model: Any torch module, on any device, not adapted.
        base_id: Readable name for messages; by default the config's name or the class name.

    Cost:
        One sha256 over all slot weights: about a second per 500 MB on a slow core.
    """
    slots = [slot_of(weight) for weight in find_weights(model).values()]
    return SlotTable(slots, base_id=base_id or base_id_of(model))


def base_id_of(model: nn.Module) -> str:
    """Return a readable name: the pretrained name where the model has one, else its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(name) or type(model).__name__


def default_slots(model: nn.Module, weights: dict[str, SlotWeight]) -> list[str]:
    """Return the slots that are adapted when the caller names none.

    These are all linear slots (``Linear`` and transformers ``Conv1D``) except the output head,
    which is found with ``get_output_embeddings`` where the model has it. An embedding is never
    among them, also when it is tied to the head.
    """
    get_head: Callable[[], nn.Module | None] = getattr(model, _HEAD_GETTER, lambda: None)
    head = getattr(get_head(), "weight", None)
    return [n for n, w in weights.items() if w.kind == "linear" and w.parameter is not head]
