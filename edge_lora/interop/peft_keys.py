"""What ``adapter_config.json`` may hold, by type: the settings that were looked at.

Each is either read, or refused where it is set, or changes nothing of a finished adapter. A newer
PEFT may have others.
"""

from __future__ import annotations

from collections.abc import Mapping

_ALL = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "revision", "target_modules", "task_type",
)  # fmt: skip
_LAYERS = ("layers_pattern", "layers_to_transform")
_PRODUCT = (
    "alpha", "alpha_pattern", "exclude_modules", "init_weights", *_LAYERS, "module_dropout",
    "modules_to_save", "r", "rank_dropout", "rank_pattern", "use_effective_conv2d",
)  # fmt: skip
_LORA = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "init_lora_weights",
    "kasa_config", "layer_replication", *_LAYERS, "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "monteclora_config", "qalora_group_size", "r", "rank_pattern", "runtime_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "use_rslora", "velora_config",
)  # fmt: skip
_SHARED = ("bias", "fan_in_fan_out", "init_weights", *_LAYERS, "modules_to_save", "r")
_BY_TYPE: dict[str, tuple[str, ...]] = {
    "ADALORA": (
        *_LORA, "beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal",
        "tinit", "total_step",
    ),
    "IA3": (
        "exclude_modules", "fan_in_fan_out", "feedforward_modules", "init_ia3_weights",
        "modules_to_save",
    ),
    "LOHA": _PRODUCT,
    "LOKR": (*_PRODUCT, "decompose_both", "decompose_factor", "rank_dropout_scale"),
    "LORA": _LORA,
    "RANDLORA": (
        *_SHARED, "projection_prng_key", "randlora_alpha", "randlora_dropout", "save_projection",
        "sparse", "very_sparse",
    ),
    "SHIRA": (
        "fan_in_fan_out", "init_weights", "mask_type", "modules_to_save", "r", "random_seed",
    ),
    "TRAINABLE_TOKENS": ("init_weights", "token_indices"),
    "UNILORA": (
        *_SHARED, "init_theta_d_bound", "proj_seed", "save_indices", "theta_d_length",
        "unilora_dropout",
    ),
    "VERA": (*_SHARED, "d_initial", "projection_prng_key", "save_projection", "vera_dropout"),
}  # fmt: skip


def unknown_settings(kind: str, config: Mapping[str, object]) -> list[str]:
    """Return the keys of ``config`` that are set and not known of its type, sorted.

    A key whose value is null, false, zero or empty is not set. Of a type that is not read from its
    files, PEFT itself knows the keys: none is returned.
    """
    if kind not in _BY_TYPE:
        return []
    known = {*_ALL, *_BY_TYPE[kind]}
    return sorted(key for key, value in config.items() if value and key not in known)
