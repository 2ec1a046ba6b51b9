"""Any folder of PEFT names is read or refused with one of our errors, never with another."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from edge_lora import Adapter, SlotTable, from_peft
from edge_lora.errors import EdgeLoraError
from edge_lora.interop.peft import TYPES
from edge_lora.slots import Slot

SHAPES = {"q": (6, 8), "conv": (4, 3, 2, 2), "norm": (8,), "table": (10, 6)}


class Base:
    slots = SlotTable(
        [
            Slot(f"{name}.weight", shape, "F32", "0" * 64, "other" if name == "norm" else "linear")
            for name, shape in SHAPES.items()
        ]
    )

    def weight(self, name):
        return np.ones(self.slots[name].shape, np.float32)

    def stores_transposed(self, name):
        return None


sizes = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 10])
arrays = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(-2, 9, shape).astype(dtype),
    st.lists(sizes, max_size=5).map(tuple),
    st.sampled_from([np.float32, np.float16, np.int32, np.float64]),
    st.integers(0, 9),
)
odd = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3)
odd |= st.lists(st.integers(-2, 9), max_size=3) | st.dictionaries(st.text(max_size=4), odd)
KEYS = (
    "r", "lora_alpha", "alpha", "init_r", "rank_pattern", "alpha_pattern", "use_dora", "bias",
    "use_rslora", "modules_to_save", "trainable_token_indices", "token_indices",
    "projection_prng_key",
    "randlora_alpha", "theta_d_length", "proj_seed", "target_modules", "feedforward_modules",
    "fan_in_fan_out", "layers_to_transform", "init_lora_weights", "ensure_weight_tying",
)  # fmt: skip
GOOD = {
    "r": 2, "lora_alpha": 4, "alpha": 4, "init_r": 2, "projection_prng_key": 3, "proj_seed": 1,
    "randlora_alpha": 4, "theta_d_length": 4, "target_modules": ["q"], "token_indices": [1, 0],
    "feedforward_modules": ["conv"], "modules_to_save": ["norm"],
}  # fmt: skip
SHARED = ("vera_A", "vera_B", "randlora_A", "randlora_B", "unilora_theta_d", "x")
EXTRA = (
    "norm.weight", "q.bias", "table.token_adapter.trainable_tokens_delta", "q.base_layer.weight",
)  # fmt: skip
SOUND = {
    "ADALORA": {"lora_A": (2, 8), "lora_B": (6, 2), "lora_E": (2, 1)},
    "IA3": {"ia3_l": (6, 1)},
    "LOHA": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)},
    "LOKR": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 4)},
    "LORA": {"lora_A.weight": (2, 8), "lora_B.weight": (6, 2)},
    "RANDLORA": {
        "randlora_lambda": (2, 3), "randlora_gamma": (3, 6), "randlora_A": (2, 1, 6),
        "randlora_B": (8, 3, 2),
    },
    "SHIRA": {"shira_weight": (3,), "shira_indices": (2, 3)},
    "TRAINABLE_TOKENS": {"trainable_tokens_delta": (2, 8)},
    "UNILORA": {
        "unilora_indices_A": (2, 8), "unilora_indices_B": (6, 2), "unilora_scales_A": (2, 8),
        "unilora_scales_B": (6, 2),
    },
    "VERA": {"vera_lambda_b": (6,), "vera_lambda_d": (2,)},
}  # fmt: skip
"""Of the layer q, with rank 2."""


def sound_tensors(kind):
    tensors = {
        f"base_model.model.q.{part}": np.ones(shape, np.int32 if "indices" in part else np.float32)
        for part, shape in SOUND[kind].items()
    }
    if kind == "SHIRA":
        tensors["base_model.model.q.shira_indices"] = np.array([[0, 5, 2], [1, 7, 0]], np.int32)
    if kind == "UNILORA":
        tensors["base_model.unilora_theta_d"] = np.ones(4, np.float32)
    return tensors


def write(folder, kind, tensors, **strange):
    config = json.dumps({"peft_type": kind, **GOOD, **strange})
    (folder / "adapter_config.json").write_text(config)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    return folder


@pytest.mark.parametrize("kind", TYPES)
def test_the_sound_ones_are_read(kind, tmp_path):
    adapter = from_peft(write(tmp_path, kind, sound_tensors(kind)), base=Base())
    assert list(adapter.deltas) == ["q.weight"]


@pytest.mark.parametrize("kind", TYPES)
@given(data=st.data())
def test_any_other_is_read_or_refused(kind, data):
    """Start from a sound one, add or replace tensors, drop some, change the config."""
    parts = [f"model.{module}.{part}" for module in SHAPES for part in TYPES[kind].parts]
    names = st.sampled_from([*parts, *SHARED, *(f"model.{name}" for name in EXTRA)])
    sound = sound_tensors(kind)
    dropped = data.draw(st.sets(st.sampled_from(sorted(sound)), max_size=1))
    added = data.draw(st.dictionaries(names.map("base_model.{}".format), arrays, max_size=2))
    strange = data.draw(st.dictionaries(st.sampled_from(KEYS), odd, max_size=2))
    kept = {name: array for name, array in sound.items() if name not in dropped}
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), kind, {**kept, **added}, **strange)
        for base in (Base(), None):
            try:
                adapter = from_peft(folder, base=base)
            except EdgeLoraError:
                continue
            assert isinstance(adapter, Adapter)
            assert base is None or not base.slots.problems(adapter)
