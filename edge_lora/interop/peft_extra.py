"""What a PEFT file holds beside its tuner's tensors: whole modules, biases, embeddings, tokens.

| config | tensor | becomes |
|---|---|---|
| modules_to_save | ``<module>.<parameter>`` | Dense, replacing |
| bias = "all" or "lora_only" | ``<module>.bias`` | Dense, replacing |
| (a resized vocabulary) | ``embed_tokens.weight``, ``lm_head.weight`` … | Dense, replacing |
| trainable_token_indices | ``<module>.token_adapter.trainable_tokens_delta`` | rows, replacing |
| (an embedding with LoRA) | ``<module>.base_layer.weight`` | nothing: the base's, compared |
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_lora.errors import AdapterFileError, EdgeLoraError, UnsupportedError
from edge_lora.forms import Dense
from edge_lora.interop.peft_source import Array, Lowered, Source, fp32
from edge_lora.interop.peft_sparse import replaced_rows

_TOKENS = ".token_adapter.trainable_tokens_delta"
_COPY = ".base_layer.weight"
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight")
_UNCOUNTED = "num_batches_tracked"  # of a batch norm: a counter that inference does not read


def extras(source: Source) -> Iterator[Lowered]:
    """Yield the forms of everything that is no tuner's; what belongs to nothing is a problem."""
    saved = source.config.names("modules_to_save")
    for key, array in source.rest.items():
        name = key.replace(".modules_to_save.", ".")
        is_twin = name != key and name in source.rest
        if is_twin or ".original_module." in key:  # saved with "bias", beside the module itself
            continue
        try:
            yield from _extra(source, name, array, saved)
        except EdgeLoraError as error:
            source.problems.append(f"{name}: {error}")


def _extra(source: Source, name: str, array: Array, saved: list[str]) -> Iterator[Lowered]:
    if name.endswith(_TOKENS):
        module = name.removesuffix(_TOKENS)
        source.require_base("the file does not say how many rows the embedding has")
        yield replaced_rows(source.slot(f"{module}.weight"), array, _tokens_of(source, module))
    elif name.endswith(_COPY):
        _compare_copy(source, name.removesuffix(_COPY) + ".weight", array)
    elif _is_saved(source, name, saved) and array.dtype.kind != "i":
        parameter = name.replace(".base_layer.", ".")
        values = _oriented(source, parameter, array)
        yield Lowered(parameter, values.shape, (Dense(values, mode="set"),))
    elif not name.endswith(_UNCOUNTED):
        raise AdapterFileError(f"belongs to nothing that {source.config.type} or the config names")


def _is_saved(source: Source, name: str, saved: list[str]) -> bool:
    if name.endswith(".bias") and source.config.trains_biases:
        return True
    return name.endswith(_EMBEDDINGS) or any(f"{module}." in name for module in saved)


def _tokens_of(source: Source, module: str) -> object:
    tokens = source.config.raw.get("trainable_token_indices")
    if not isinstance(tokens, dict):
        return tokens
    return next((t for n, t in tokens.items() if f".{module}".endswith(f".{n}")), None)


def _oriented(source: Source, name: str, array: Array) -> Array:
    """Return a saved matrix as its slot has it; GPT-2's layers store (in, out).

    ``fan_in_fan_out`` is about the layers that the tuner adapts, not about saved ones.
    """
    if array.ndim != 2 or name.endswith(_EMBEDDINGS):
        return array
    base = source.base
    is_transposed = base.stores_transposed(source.slot(name).name) if base else None
    if is_transposed is None and array.shape[0] == array.shape[1]:
        raise UnsupportedError(
            "whether its layer stores (out, in) or, as GPT-2's, (in, out) cannot be told; "
            "give base=edge_lora.methods.model_base.ModelBase(model)"
        )
    if is_transposed is None and (base or source.config.flag("fan_in_fan_out")):
        is_transposed = array.shape != source.slot(name).shape
    return array.T.copy() if is_transposed else array


def _compare_copy(source: Source, name: str, array: Array) -> None:
    """PEFT saves an embedding that LoRA adapts along with it; it must be the base's."""
    if source.base is None:
        return
    weight = source.base.weight(source.slot(name).name)
    if weight.shape != array.shape:
        raise AdapterFileError(f"the base's copy in the file is {array.shape}, not {weight.shape}")
    copy = fp32(array)
    coarsest = 2.0**-8  # one side may have been rounded to bf16
    if np.abs(weight - copy).max() > coarsest * np.abs(weight).max():
        raise AdapterFileError("the copy of the base's weight in the file is not this base's")
