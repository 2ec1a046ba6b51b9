"""Hostile PEFT folders: each is refused with one clear error, quickly, and nothing is executed."""

import json
import os
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from edge_lora import SlotTable, from_peft
from edge_lora.errors import AdapterFileError, EdgeLoraError, UnknownNameError, UnsupportedError
from edge_lora.slots import Slot

MODULE = "layers.0.q"
KEY = f"base_model.model.{MODULE}."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
A = np.ones((2, 8), np.float32)
B = np.ones((6, 2), np.float32)
TENSORS = {f"{KEY}lora_A.weight": A, f"{KEY}lora_B.weight": B}


class Base:
    """One linear layer of (6, 8) and a table of (10, 6)."""

    slots = SlotTable(
        [
            Slot("table.weight", (10, 6), "F32", "0" * 64, "embedding"),
            Slot(f"{MODULE}.weight", (6, 8), "BF16", "1" * 64),
            Slot(f"{MODULE}.bias", (6,), "F32", "2" * 64, "other"),
        ],
        "tiny",
    )

    def weight(self, name):
        return np.ones(self.slots[name].shape, np.float32)

    def stores_transposed(self, name):
        return None


def write(folder, config=CONFIG, tensors=TENSORS):
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    blob = tensors if isinstance(tensors, bytes) else save(tensors)
    (folder / "adapter_model.safetensors").write_bytes(blob)
    return folder


def test_the_sound_one_is_sound(tmp_path):
    unbound = from_peft(write(tmp_path), name="x")
    assert unbound.deltas[f"{MODULE}.weight"].forms[0].scale == 2.0
    assert (unbound.base.fingerprint, unbound.name) == ("", "x")
    bound = from_peft(tmp_path, base=Base())
    assert bound.base.fingerprint == Base.slots.fingerprint
    assert bound.deltas[f"{MODULE}.weight"].dtype == "BF16"
    assert bound.deltas[f"{MODULE}.weight"].slot_hash == "1" * 16
    assert not Base.slots.problems(bound)


def test_a_newer_peft_is_told(tmp_path, caplog):
    from_peft(write(tmp_path, {**CONFIG, "peft_version": "0.21.9"}))
    assert not caplog.records
    from_peft(write(tmp_path, {**CONFIG, "peft_version": "1.0.dev0"}))
    assert "written by PEFT 1.0" in caplog.text


def test_settings_that_nobody_knows_are_told(tmp_path, caplog):
    unset = {"new_switch": False, "new_config": None, "new_names": [], "loftq_config": {}}
    from_peft(write(tmp_path, {**CONFIG, **unset, "eva_config": {"rho": 2.0}}))
    assert not caplog.records
    from_peft(write(tmp_path, {**CONFIG, "new_switch": True, "init_r": 3}))
    assert "may change what the adapter does: 'init_r', 'new_switch'" in caplog.text


def header_bomb():
    return struct.pack("<Q", 1 << 40) + b"{}" * 100


def repeated_tensor():
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = "{" + entry + "," + entry + "}"
    return struct.pack("<Q", len(text)) + text.encode() + bytes(4)


with_config = {
    "no type": ({"r": 2}, "peft_type"),
    "type is a number": ({**CONFIG, "peft_type": 7}, "peft_type"),
    "rank 0": ({**CONFIG, "r": 0}, "rank of layers.0.q is 0"),
    "rank is huge": ({**CONFIG, "r": 10**12}, "must be from 1 to"),
    "rank is a float": ({**CONFIG, "r": 2.0}, "rank of layers.0.q is 2.0"),
    "rank is true": ({**CONFIG, "r": True}, "rank of layers.0.q is True"),
    "rank differs": ({**CONFIG, "r": 4}, "factors have rank 2, the config says 4"),
    "rank is missing": ({**CONFIG, "r": None}, "rank of layers.0.q is None"),
    "alpha is text": ({**CONFIG, "lora_alpha": "4"}, "alpha of layers.0.q is '4'"),
    "alpha pattern is text": ({**CONFIG, "alpha_pattern": {"q": "8"}}, "'8', must be a number"),
    "pattern is a list": ({**CONFIG, "rank_pattern": [1]}, "'rank_pattern' is [1]"),
    "pattern is no regex": ({**CONFIG, "rank_pattern": {"(": 2}}, "pattern '('"),
    "pattern looks around": ({**CONFIG, "rank_pattern": {"(?=q)q": 2}}, "is not understood"),
    "pattern looks back": ({**CONFIG, "rank_pattern": {r"(q)\1": 2}}, "is not understood"),
    "pattern nests": ({**CONFIG, "rank_pattern": {"(" * 99 + ")" * 99: 2}}, "deeper than 20"),
    "pattern repeats nothing": ({**CONFIG, "rank_pattern": {"q**": 2}}, "nothing to repeat"),
    "pattern is backwards": ({**CONFIG, "rank_pattern": {"[z-a]q": 2}}, "bad character range"),
    "pattern is huge": ({**CONFIG, "rank_pattern": {"((q{99}){99}){99}": 2}}, "too large"),
    "pattern of nothing, often": (
        {**CONFIG, "rank_pattern": {"((){9999999999}){9999999999}": 2}}, "too large",
    ),
    "many patterns of stars": (
        {**CONFIG, "rank_pattern": {f".*{i}": 2 for i in range(999)}}, "over 256 patterns",
    ),
    "patterns without end": (
        {**CONFIG, "rank_pattern": {str(i): 2 for i in range(70_000)}}, "over 65536 patterns",
    ),
    "pattern is long": ({**CONFIG, "alpha_pattern": {"(q)" * 99: 2}}, "over 256 characters"),
    "bias is a number": ({**CONFIG, "bias": 5}, "'bias' is 5, must be"),
    "bias is another word": ({**CONFIG, "bias": "some"}, "'bias' is 'some', must be"),
    "bias that is missing": ({**CONFIG, "lora_bias": True}, "layers.0.q: lora_B.bias missing"),
    "flag is text": ({**CONFIG, "use_rslora": "no"}, "'use_rslora' is 'no'"),
    "saved modules are text": (
        {**CONFIG, "modules_to_save": "head"}, "'modules_to_save' is 'head'",
    ),
    "duplicate keys": ('{"peft_type": "LORA", "r": 2, "r": 3}', "duplicate keys"),
    "alpha is infinite": ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}', "not finite"),
    "NaN": ('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "NaN"),
    "not an object": ("[]", "not a JSON object"),
    "cut off": ('{"peft_type": "LORA"', "not JSON"),
    "nested": ('{"a":' * 5000 + "1" + "}" * 5000, "not JSON|nests"),
    "not UTF-8": ("\udcff", "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", with_config)
def test_a_bad_config_is_refused(case, tmp_path):
    config, message = with_config[case]
    write(tmp_path)
    if config == "\udcff":
        (tmp_path / "adapter_config.json").write_bytes(b'{"peft_type": "\xff"}')
    else:
        write(tmp_path, config)
    begin = time.perf_counter()
    pattern = message.replace("(", r"\(").replace("[", r"\[")
    with pytest.raises(AdapterFileError, match=f"(?s){pattern}"):
        from_peft(tmp_path)
    assert time.perf_counter() - begin < 1


LONG = "layers.0." + "q" * 190
EXPLODING = {
    "nested": "(.+)+x",
    "many stars": ".*" * 80 + "x",
    "optional": "q?" * 100 + "q" * 50 + "x",
    "alternatives": "(q|q)" * 40 + "x",
    "nested alternatives": "(q|qq?|x|)" * 20 + "x",
    "counted": "(q{1,20}){1,20}x",
}


@pytest.mark.parametrize("case", EXPLODING)
def test_a_pattern_that_explodes_elsewhere_is_matched(case, tmp_path):
    key = f"base_model.model.{LONG}."
    tensors = {f"{key}lora_A.weight": A, f"{key}lora_B.weight": B}
    patterns = {EXPLODING[case]: 7, f"{EXPLODING[case][:-1]}q+": 3}
    write(tmp_path, {**CONFIG, "alpha_pattern": patterns}, tensors)
    begin = time.perf_counter()
    adapter = from_peft(tmp_path)
    assert time.perf_counter() - begin < 1
    assert adapter.deltas[f"{LONG}.weight"].forms[0].scale == 3 / 2


def test_steps_are_counted_over_all_patterns_and_names(tmp_path):
    tensors = {
        f"base_model.model.{n}.{'q.' * 100}{part}": array
        for n in range(400)
        for part, array in (("lora_A.weight", A), ("lora_B.weight", B))
    }
    patterns = {f"({'.*' * 60}){n}": 2 for n in range(250)}
    write(tmp_path, {**CONFIG, "rank_pattern": patterns}, tensors)
    begin = time.perf_counter()
    with pytest.raises(AdapterFileError, match="too costly"):
        from_peft(tmp_path)
    assert time.perf_counter() - begin < 10  # a few seconds; unbounded it would be minutes


with_tensors = {
    "header bomb": (header_bomb(), "header claims"),
    "tiny": (b"{}", "2 bytes"),
    "random bytes": (bytes(range(8)) * 4, "header claims|damaged"),
    "a tensor twice": (repeated_tensor(), "duplicate"),
    "truncated": (save(TENSORS)[:-4], "damaged"),
    "nothing": (save({}), "no tensors"),
    "no half": ({f"{KEY}lora_A.weight": A}, "lora_B.weight missing"),
    "halves disagree": (
        {f"{KEY}lora_A.weight": A, f"{KEY}lora_B.weight": np.ones((6, 3), np.float32)},
        "lora_B.weight is float32 (6, 3), must be (any, 2)",
    ),
    "a factor of one axis": (
        {f"{KEY}lora_A.weight": A[0], f"{KEY}lora_B.weight": B}, "of no layer that LoRA adapts",
    ),
    "a factor of whole numbers": (
        {f"{KEY}lora_A.weight": A.astype(np.int32), f"{KEY}lora_B.weight": B}, "int32",
    ),
    "NaN": ({**TENSORS, f"{KEY}lora_A.weight": A * np.nan}, "NaN or infinity"),
    "infinite bf16": (
        {**TENSORS, f"{KEY}lora_A.weight": (A * np.inf).astype(ml_dtypes.bfloat16)},
        "NaN or infinity",
    ),
    "a strange dtype": ({**TENSORS, "base_model.model.x": np.ones(2, np.uint8)}, "dtype U8"),
    "no prefix": ({**TENSORS, "layers.1.q.lora_A.weight": A}, "does not begin with"),
    "belongs to nothing": (
        {**TENSORS, "base_model.model.layers.0.k.weight": A}, "k.weight: belongs to nothing",
    ),
    "shared by nothing": ({**TENSORS, "base_model.vera_A": A}, "vera_A: belongs to nothing"),
    "DoRA's magnitude without DoRA": (
        {**TENSORS, f"{KEY}lora_magnitude_vector": B[:, 0]}, "lora_magnitude_vector not expected",
    ),
    "a bias without lora_bias": (
        {**TENSORS, f"{KEY}lora_B.bias": B[:, 0]}, "lora_B.bias not expected",
    ),
    "a name with control characters": (
        {**TENSORS, "base_model.model.\x1b[2J.lora_A.weight": A}, "x1b",
    ),
    "a very long name": ({**TENSORS, "base_model.model." + "x" * 9999: A}, "dtype F32"),
}  # fmt: skip


@pytest.mark.parametrize("case", with_tensors)
def test_bad_tensors_are_refused(case, tmp_path):
    tensors, message = with_tensors[case]
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(AdapterFileError, match="(?s)" + pattern):
        from_peft(write(tmp_path, tensors=tensors))


def test_everything_that_is_wrong_is_listed_at_once(tmp_path):
    tensors = {
        **TENSORS,
        "base_model.model.layers.1.q.lora_A.weight": A,
        "base_model.model.layers.2.q.lora_A.weight": A,
        "base_model.model.layers.2.q.lora_B.weight": B[:, :1],
        "base_model.model.stray": A,
    }
    with pytest.raises(AdapterFileError) as error:
        from_peft(write(tmp_path, tensors=tensors), base=Base())
    for fact in ("layers.1.q: lora_B.weight missing", "layers.2.q: lora_B", "stray: belongs to"):
        assert fact in str(error.value)


def test_a_base_that_does_not_fit_is_told_slot_by_slot(tmp_path):
    tensors = {
        f"{KEY}lora_A.weight": A[:, :7],
        f"{KEY}lora_B.weight": B,
        "base_model.model.layers.9.q.lora_A.weight": A,
        "base_model.model.layers.9.q.lora_B.weight": B,
    }
    with pytest.raises(AdapterFileError) as error:
        from_peft(write(tmp_path, tensors=tensors), base=Base())
    assert f"{MODULE}.weight: made for (6, 7), slot is (6, 8)" in str(error.value)
    assert "layers.9.q.weight: the base has no such slot" in str(error.value)


REFUSED = {
    "prompt": ({"peft_type": "PREFIX_TUNING"}, "virtual tokens"),
    "routed": ({"peft_type": "XLORA"}, "depends on the input"),
    "through PEFT": ({"peft_type": "BOFT"}, "from_peft_model"),
    **{
        init: ({**CONFIG, "init_lora_weights": init}, "path_initial_model_for_weight_conversion")
        for init in ("pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "lora_ga")
    },
    "unknown init": ({**CONFIG, "init_lora_weights": "brandnew"}, "unknown; it may change"),
    "aLoRA": ({**CONFIG, "alora_invocation_tokens": [1]}, "only after certain tokens"),
    "megatron": ({**CONFIG, "megatron_config": {"x": 1}}, "Megatron"),
    "replication": ({**CONFIG, "layer_replication": [[0, 4], [2, 5]]}, "replicated"),
    "experts": ({**CONFIG, "target_parameters": ["experts.up"]}, "bare parameters"),
    "DoRA without a base": ({**CONFIG, "use_dora": True}, "DoRA.*give base="),
    "SHiRA without a base": ({"peft_type": "SHIRA", "r": 2}, "layers' shapes; give base="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_reason(case, tmp_path):
    config, reason = REFUSED[case]
    with pytest.raises(UnsupportedError, match=f"(?s){reason}"):
        from_peft(write(tmp_path, config))


def test_several_reasons_are_given_at_once(tmp_path):
    config = {**CONFIG, "init_lora_weights": "pissa", "use_qalora": True, "arrow_config": {"a": 1}}
    with pytest.raises(UnsupportedError, match=r"(?s)Arrow.*QA-LoRA.*pissa"):
        from_peft(write(tmp_path, config))


def test_an_unknown_type_lists_the_known_ones(tmp_path):
    with pytest.raises(UnknownNameError) as error:
        from_peft(write(tmp_path, {"peft_type": "NOVA"}))
    for fact in ("'NOVA'", "ADALORA, IA3, LOHA", "BOFT", "change no weight", "P_TUNING"):
        assert fact in str(error.value)


def test_a_folder_without_a_config_or_without_weights(tmp_path):
    with pytest.raises(AdapterFileError, match=r"no adapter_config.json \(that folder does not"):
        from_peft(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match=r"no adapter_config\.json\. Give the folder"):
        from_peft(tmp_path)
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"no adapter_model\.safetensors"):
        from_peft(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "adapter_model.bin")  # opening it would hang
    with pytest.raises(AdapterFileError, match=r"adapter_model.bin is a pickle.*save_pretrained"):
        from_peft(tmp_path)


def test_a_config_that_is_too_large_is_not_read(tmp_path):
    write(tmp_path)
    with (tmp_path / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 34)
    with pytest.raises(AdapterFileError, match="over 16777216 bytes"):
        from_peft(tmp_path)


def test_pipes_instead_of_files(tmp_path):
    write(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(AdapterFileError):
            from_peft(tmp_path)


SHIRA = {"peft_type": "SHIRA", "r": 2}
VALUES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[0, 1, 6], [0, 1, 2]], "outside of the slot's shape"),
        ([[0, 1, 2], [0, 1, 8]], "outside of the slot's shape"),
        ([[0, 1, -1], [0, 1, 2]], "outside of the slot's shape"),
        ([[0, 1, 1], [0, 2, 2]], "an entry twice"),
        ([[0, 1], [0, 2]], "must be \\(2, 3\\)"),
        ([[0, 1, 0.5], [0, 1, 2]], "whole numbers"),
        ([[0, 1, 3e9], [0, 1, 2]], "outside of the slot's shape"),
    ],
)
def test_sparse_indices_that_lie(indices, message, tmp_path):
    whole = np.array(indices)
    dtype = np.int32 if whole.dtype.kind == "i" else np.float32
    tensors = {f"{KEY}shira_weight": VALUES, f"{KEY}shira_indices": whole.astype(dtype)}
    with pytest.raises(AdapterFileError, match=message):
        from_peft(write(tmp_path, SHIRA, tensors), base=Base())


def test_sparse_indices_of_windows_and_out_of_order(tmp_path):
    index = np.array([[5, 0, 5], [7, 3, 0]], np.float32)
    tensors = {f"{KEY}shira_weight": VALUES * [1, 2, 3], f"{KEY}shira_indices": index}
    tensors[f"{KEY}shira_weight"] = tensors[f"{KEY}shira_weight"].astype(np.float32)
    form = (
        from_peft(write(tmp_path, SHIRA, tensors), base=Base()).deltas[f"{MODULE}.weight"].forms[0]
    )
    assert form.indices.tolist() == [3, 40, 47]
    assert form.values.tolist() == [2, 3, 1]


def test_projections_of_any_size_are_not_drawn(tmp_path):
    config = {"peft_type": "VERA", "r": 65536, "projection_prng_key": 0}
    tensors = {f"{KEY}vera_lambda_b": B[:, 0], f"{KEY}vera_lambda_d": B[:, 0]}
    slots = SlotTable([Slot(f"{MODULE}.weight", (6, 1 << 30), "F32", "0" * 64)])
    unread = {"weight": lambda self, name: None, "stores_transposed": lambda self, name: None}
    base = type("Wide", (), {"slots": slots, **unread})()
    with pytest.raises(UnsupportedError, match="asks for a projection"):
        from_peft(write(tmp_path, config, tensors), base=base)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("IA3", {"ia3_l": np.ones((5, 1), np.float32)}),
        ("IA3", {"ia3_l": np.ones((1, 6), np.float32)}),
        ("IA3", {"ia3_l": np.ones((1, 8), np.float32)}),
        ("LOHA", {"hada_w1_a": A, "hada_w1_b": A, "hada_w2_a": B, "hada_w2_b": B}),
        ("LOHA", {f"hada_{n}": A[0] for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}),
        ("LOKR", {"lokr_w1": A[0], "lokr_w2": A}),
        ("LOKR", {"lokr_w1": A, "lokr_w2_a": A, "lokr_w2_b": B}),
        ("LOKR", {"lokr_w1": A, "lokr_t2": A, "lokr_w2_a": A, "lokr_w2_b": B}),
        ("ADALORA", {"lora_A": A, "lora_B": B, "lora_E": A}),
        ("ADALORA", {"lora_A": A[0], "lora_B": B, "lora_E": A}),
        ("VERA", {"vera_lambda_b": A, "vera_lambda_d": A}),
        ("RANDLORA", {f"randlora_{n}": A for n in ("lambda", "gamma", "A", "B")}),
        ("UNILORA", {f"unilora_{n}_{x}": A for n in ("indices", "scales") for x in "AB"}),
        ("TRAINABLE_TOKENS", {"trainable_tokens_delta": A}),
    ],
)  # fmt: skip
def test_misshapen_tensors_of_every_type(kind, parts, tmp_path):
    config = {
        **CONFIG, "peft_type": kind, "alpha": 1, "init_r": 2, "projection_prng_key": 0,
        "randlora_alpha": 1, "theta_d_length": 2, "token_indices": [1],
    }  # fmt: skip
    tensors = {f"{KEY}{part}": array for part, array in parts.items()}
    if kind == "UNILORA":
        tensors["base_model.unilora_theta_d"] = A[0, :2]
    with pytest.raises(EdgeLoraError, match=r"layers\.0\.q"):
        from_peft(write(tmp_path, config, tensors), base=Base())


@pytest.mark.parametrize("tokens", [None, [1.5], [-1], [10], [1, 2]])
def test_token_indices_that_lie(tokens, tmp_path):
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": tokens}
    tensors = {"base_model.model.table.trainable_tokens_delta": A[:1, :6]}
    with pytest.raises(AdapterFileError, match="table"):
        from_peft(write(tmp_path, config, tensors), base=Base())


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "LOKR conv", "LOKR whole", "LOHA conv"])
def test_small_factors_that_claim_a_huge_weight(kind, tmp_path):
    long, wide = np.ones((1 << 16, 1), np.float32), np.ones((1, 1 << 16), np.float32)
    core = np.ones((1, 1, 1, 1), np.float32)
    parts = {
        "LOHA": {"hada_w1_a": long, "hada_w1_b": wide, "hada_w2_a": long, "hada_w2_b": wide},
        "LOHA conv": {
            "hada_w1_a": wide, "hada_w1_b": wide, "hada_w2_a": wide, "hada_w2_b": wide,
            "hada_t1": core, "hada_t2": core,
        },
        "LOKR": {"lokr_w1": long, "lokr_w2": wide},
        "LOKR conv": {"lokr_w1": long, "lokr_t2": core, "lokr_w2_a": wide, "lokr_w2_b": wide},
        "LOKR whole": {"lokr_w1": wide, "lokr_w2": long[:, :, None, None]},
    }[kind]  # fmt: skip
    config = {"peft_type": kind.split()[0], "r": 1, "alpha": 1}
    write(tmp_path, config, {f"{KEY}{part}": array for part, array in parts.items()})
    with pytest.raises(AdapterFileError, match="claims a weight of"):
        from_peft(tmp_path)
    with pytest.raises(AdapterFileError, match="slot is"):
        from_peft(tmp_path, base=Base())


def test_the_costliest_pattern_that_is_allowed_is_cheap(tmp_path):
    module = "a." * 100 + "q"
    tensors = {f"base_model.model.{module}.{part}.weight": x for part, x in
               (("lora_A", A), ("lora_B", B))}  # fmt: skip
    config = {**CONFIG, "rank_pattern": {f".*.*{i}x": 3 for i in range(64)}}
    begin = time.perf_counter()
    from_peft(write(tmp_path, config, tensors))
    assert time.perf_counter() - begin < 5
