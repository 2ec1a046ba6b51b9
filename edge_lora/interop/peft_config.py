"""What ``adapter_config.json`` says, checked: the type, scales per module, and what to refuse."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from edge_lora.errors import AdapterFileError, UnknownNameError, UnsupportedError, list_all
from edge_lora.interop.name_pattern import Budget, Pattern, PatternTable, ends_of
from edge_lora.interop.peft_keys import unknown_settings

CHECKED_WITH = (0, 21)
"""The newest PEFT whose files were compared; a newer one may have settings that matter."""
MAX_RANK = 1 << 16
MAX_NAMES = 1 << 16

PROMPT_TYPES = (
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING",
    "PREFIX_TUNING", "PROMPT_TUNING",
)  # fmt: skip
"""They add virtual tokens or attention states; they change no weight."""
ROUTED_TYPES = ("LILY", "PEANUT", "POLY", "SHADOW", "XLORA")
"""What they add depends on the input; no change of a weight expresses it."""
MERGED_TYPES = (
    "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "LN_TUNING", "MISS", "OFT", "OSF", "PSOFT", "PVERA", "ROAD", "SUPERTUNING",
    "TINYLORA", "VBLORA", "WAVEFT",
)  # fmt: skip
"""Read by PEFT itself, see ``edge_lora.methods.peft_model``."""

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_INITS = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")
_VARIANTS = {
    "alora_invocation_tokens": "aLoRA adds its branch only after certain tokens",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA cuts singular values off the base's weights",
    "layer_replication": "the layers of the base were replicated",
    "megatron_config": "the layers are Megatron's",
    "monteclora_config": "MonteCLoRA samples its factors",
    "target_parameters": "it adapts bare parameters (mixtures of experts), not modules",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "use_qalora": "QA-LoRA pools the inputs of its branch",
    "velora_config": "VeLoRA keeps a state of its own",
}


@dataclass(frozen=True)
class PeftConfig:
    """A checked view of the config.

    Attributes:
        raw: The whole JSON object.
        type: ``peft_type``.
        budget: Of steps, for matching its patterns.
    """

    raw: dict[str, Any]
    type: str
    budget: Budget = field(default_factory=Budget)

    @cached_property
    def ranks(self) -> PatternTable:
        """Ranks by patterns of module names."""
        return self._table("rank_pattern")

    @cached_property
    def alphas(self) -> PatternTable:
        """Alphas by patterns of module names."""
        return self._table("alpha_pattern")

    @property
    def trains_biases(self) -> bool:
        """Whether the file holds biases of the base, too."""
        return self.raw.get("bias") not in (None, "none")

    def flag(self, key: str) -> bool:
        """Return a switch; missing is off."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise AdapterFileError(f"config: {key!r} is {value!r:.40}, must be true or false")
        return bool(value)

    def number(self, key: str) -> float:
        """Return a finite number."""
        return _number(self.raw.get(key), f"config: {key!r}")

    def natural(self, key: str, most: int = MAX_RANK, least: int = 1) -> int:
        """Return a whole number."""
        return _natural(self.raw.get(key), f"config: {key!r}", most, least)

    def names(self, key: str) -> list[str]:
        """Return a list of module names; missing or null is empty."""
        value = self.raw.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise AdapterFileError(f"config: {key!r} is {value!r:.40}, must be a list of names")
        if len(value) > MAX_NAMES:
            raise AdapterFileError(f"config: {key!r} has {len(value)} names, over {MAX_NAMES}")
        return value

    def rank_of(self, module: str) -> int:
        """Return the rank of a module: of the first pattern that matches its end, or ``r``."""
        found = self.ranks.get(module, self.raw.get("r"))
        return _natural(found, f"config: rank of {module}", MAX_RANK)

    def alpha_of(self, module: str, key: str = "lora_alpha") -> float:
        """Return the alpha of a module: of the first pattern that matches its end, or ``key``."""
        found = self.alphas.get(module, self.raw.get(key))
        return _number(found, f"config: alpha of {module}")

    def selector(self, key: str) -> Callable[[str], bool]:
        """Return whether the names or the regular expression under ``key`` select a module."""
        value = self.raw.get(key)
        if isinstance(value, str):
            return Pattern(value, self.budget).fullmatch
        names = set(self.names(key))
        return lambda module: any(end in names for end in ends_of(module))

    def _table(self, key: str) -> PatternTable:
        patterns = self.raw.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"config: {key!r} is {patterns!r:.40}, must be an object")
        return PatternTable(patterns, key, self.budget)


def parse_config(raw: dict[str, Any], supported: tuple[str, ...]) -> PeftConfig:
    """Return the config of a type that can be read from its files.

    Args:
        raw: The JSON object.
        supported: Types that the caller can read.

    Raises:
        UnknownNameError: If the type is none of PEFT's that are known here; lists them.
        UnsupportedError: If the type or a setting cannot be imported exactly; lists each reason.
    """
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterFileError(f"config: 'peft_type' is {kind!r:.40}, must be a name")
    if kind not in supported:
        raise _refusal_of_type(kind, supported)
    problems = [
        f"{why} ({key})" for key, why in _VARIANTS.items() if raw.get(key) not in (None, False, [])
    ]
    init = raw.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else init
    if isinstance(name, str) and name.startswith(_CHANGED_BASE):
        problems.append(
            f"init_lora_weights={init!r} changed the base's weights before training, so the "
            "factors mean nothing on the original base. Save it again as plain LoRA: "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    elif not any(name is known or name == known for known in _PLAIN_INITS):
        problems.append(f"init_lora_weights={init!r:.40} is unknown; it may change the base")
    if problems:
        raise UnsupportedError(list_all(f"this {kind} adapter cannot be imported", problems))
    bias = raw.get("bias")
    if bias not in (None, "none", "all") and not (isinstance(bias, str) and bias.endswith("_only")):
        raise AdapterFileError(
            f"config: 'bias' is {bias!r:.40}, must be 'none', 'all' or '<type>_only'"
        )
    _warn_of_unknown(raw, kind)
    return _compiled(PeftConfig(raw, kind))


def _compiled(config: PeftConfig) -> PeftConfig:
    """Return ``config``; raises AdapterFileError if one of its patterns is refused."""
    _ = config.ranks, config.alphas
    return config


def _warn_of_unknown(raw: dict[str, Any], kind: str) -> None:
    unknown = unknown_settings(kind, raw)
    if unknown:
        logging.getLogger(__name__).warning(
            "settings that are not known and may change what the adapter does: %.200s",
            ", ".join(map(repr, unknown)),
        )
    found = re.match(r"(\d{1,4})\.(\d{1,4})", str(raw.get("peft_version")))
    if found and (int(found[1]), int(found[2])) > CHECKED_WITH:
        logging.getLogger(__name__).warning(
            "written by PEFT %s; its files were compared up to %d.%d", found[0], *CHECKED_WITH
        )


def _refusal_of_type(kind: str, supported: tuple[str, ...]) -> Exception:
    if kind in PROMPT_TYPES:
        return UnsupportedError(
            f"{kind} adds virtual tokens and changes no weight; it cannot be imported"
        )
    if kind in ROUTED_TYPES:
        return UnsupportedError(
            f"what {kind} adds depends on the input; no change of a weight expresses it"
        )
    if kind in MERGED_TYPES:
        return UnsupportedError(
            f"{kind} is read by PEFT itself, on the torch model: edge_lora.methods.peft_model"
            ".from_peft_model(PeftModel.from_pretrained(model, folder))"
        )
    return UnknownNameError(
        f"unknown peft_type {kind!r:.40}. Read from their files: {', '.join(supported)}. "
        f"Through PEFT and a torch model: {', '.join(MERGED_TYPES)}. "
        f"Not supported, they change no weight: {', '.join((*PROMPT_TYPES, *ROUTED_TYPES))}"
    )


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterFileError(f"{what} is {value!r:.40}, must be a number")
    return float(value)


def _natural(value: object, what: str, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise AdapterFileError(f"{what} is {value!r:.40}, must be from {least} to {most}")
    return value
