"""Exported graphs against torch: plain, and with low-rank inputs against a merged torch model."""

import hashlib

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from edge_lora.bundle import read_manifest
from edge_lora.export import export_bundle

pytestmark = [pytest.mark.torch, pytest.mark.ort]

RELATIVE = 2e-5  # fp32 through two layers; sums in another order


def llama(tied):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
        )
    )


def gpt2():
    config = GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        eos_token_id=2,
        bos_token_id=1,
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero when fresh: a lost bias would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Cnn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)

    def forward(self, x, scale):
        features = torch.relu(self.norm(self.conv(x)))
        return {"logits": self.head(features.mean((2, 3))) * scale, "features": features}


LANGUAGE = {"llama": lambda: llama(False), "llama-tied": lambda: llama(True), "gpt2": gpt2}
GENERIC = {
    "mlp-2d": (Mlp, {"x": torch.randn(1, 6)}),
    "mlp-3d": (Mlp, {"x": torch.randn(2, 4, 6)}),
    "cnn": (Cnn, {"x": torch.randn(1, 3, 8, 8), "scale": torch.full((1, 1), 2.0)}),
}


@pytest.fixture(scope="module", params=[*LANGUAGE, *GENERIC])
def exported(request, tmp_path_factory):
    """(name, torch model, bundle with slots="inputs"): one export serves all tests of this file."""
    torch.manual_seed(1)
    out = tmp_path_factory.mktemp(request.param) / "out"
    if request.param in LANGUAGE:
        model, options = LANGUAGE[request.param]().eval(), {"slot_names": ["*"]}
    else:
        make, inputs = GENERIC[request.param]
        model, options = make().eval(), {"example_inputs": inputs}
    export_bundle(model, out, slots="inputs", progress=False, **options)
    return request.param, model, out


def language_case(config, batch, seq, past):
    torch.manual_seed(batch + seq + past)
    heads, size = config["kv_heads"], config["head_dim"]
    feeds = {
        "input_ids": torch.randint(0, config["vocab_size"], (batch, seq)),
        "attention_mask": torch.ones(batch, past + seq, dtype=torch.long),
        "position_ids": torch.arange(past, past + seq).repeat(batch, 1),
    }
    for layer in range(config["num_layers"]):
        for part in ("key", "value"):
            feeds[f"past.{layer}.{part}"] = torch.randn(batch, heads, past, size)
    return feeds


def run_torch(model, feeds):
    """The model as its user calls it: the oracle knows nothing of our wrapper or attention."""
    if "input_ids" not in feeds:
        with torch.no_grad():
            output = model(**feeds)
        return output if isinstance(output, dict) else {"output_0": output}
    from transformers import DynamicCache

    cache = DynamicCache()
    layers = sum(name.endswith(".key") for name in feeds)
    for layer in range(layers):
        cache.update(feeds[f"past.{layer}.key"], feeds[f"past.{layer}.value"], layer)
    plain = {k: feeds[k] for k in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        output = model(**plain, past_key_values=cache, use_cache=True)
    found = {"logits": output.logits}
    for layer, entry in enumerate(cache.layers):
        found |= {f"present.{layer}.key": entry.keys, f"present.{layer}.value": entry.values}
    return found


def run_graph(out, manifest, feeds):
    session = ort.InferenceSession(str(out / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in manifest.outputs]
    arrays = {k: np.asarray(v) for k, v in feeds.items()}
    return dict(zip(names, session.run(names, arrays), strict=True))


def cases(name, manifest):
    if name in LANGUAGE:
        shapes = ((1, 1, 0), (2, 5, 0), (1, 1, 7), (2, 5, 7))
        return [language_case(manifest.config, *shape) for shape in shapes]
    inputs = GENERIC[name][1]
    return [{k: torch.randn(n, *x.shape[1:]) for k, x in inputs.items()} for n in (1, 3)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        want = expected[name].numpy()
        assert array.shape == want.shape
        assert np.abs(array - want).max() <= RELATIVE * np.abs(want).max(), name


def test_base_equals_torch(exported):
    name, model, out = exported
    manifest = read_manifest(out)
    assert manifest.parity["onnxruntime"] < RELATIVE
    for feeds in cases(name, manifest):
        assert_same(run_graph(out, manifest, feeds), run_torch(model, feeds))


def test_low_rank_inputs_equal_a_merged_model(exported):
    name, model, out = exported
    manifest = read_manifest(out)
    rng = np.random.default_rng(0)
    factors, before = {}, {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for index, (slot_name, slot) in enumerate(manifest.slots.items()):
            a_name, b_name = manifest.stored[slot_name].lora_inputs
            rank = 1 + index % 3  # every slot has a rank of its own
            a = rng.standard_normal((slot.shape[1], rank)).astype(np.float32) / 4
            b = rng.standard_normal((rank, slot.shape[0])).astype(np.float32) / 4
            factors |= {a_name: a, b_name: b}
            delta = torch.from_numpy((a @ b).T)  # (out, in)
            weight = parameters[slot_name]
            weight += delta if weight.shape == slot.shape and "c_" not in slot_name else delta.T
    try:
        for feeds in cases(name, manifest):
            merged = run_torch(model, feeds)
            assert_same(run_graph(out, manifest, {**feeds, **factors}), merged)
            base = run_graph(out, manifest, feeds)
            first = manifest.outputs[0].name
            assert np.abs(base[first] - merged[first].numpy()).max() > 1e-2
    finally:
        model.load_state_dict(before)


def test_stored_bytes_are_the_torch_weights(exported):
    _, model, out = exported
    manifest = read_manifest(out)
    blob = (out / "onnx/weights.bin").read_bytes()
    parameters = dict(model.named_parameters())
    for name, slot in manifest.slots.items():
        place = manifest.stored[name]
        shape = slot.shape if place.layout == "oi" else slot.shape[::-1]
        count = int(np.prod(shape))
        array = np.frombuffer(blob, np.float32, count, place.offset).reshape(shape)
        array = array if place.layout == "oi" else array.T
        assert hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() == slot.sha256
        weight = parameters[name].detach().numpy()
        is_conv1d = ".c_" in name
        np.testing.assert_array_equal(array, weight.T if is_conv1d else weight)


def test_graph_reads_weights_without_a_transposition(exported):
    name, _, out = exported
    stored = read_manifest(out).stored
    readers = {s: set(p.operators) for s, p in stored.items()}
    tied = {"llama-tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}.get(name)
    for slot, operators in readers.items():
        if slot == tied:
            assert operators == {"Gather", "Transpose"}
        else:
            assert "Transpose" not in operators, slot


def test_the_output_head_gets_inputs_only_when_named(tmp_path):
    export_bundle(llama(False).eval(), tmp_path / "out", slots="inputs", progress=False)
    stored = read_manifest(tmp_path / "out").stored
    assert "model.embed_tokens.weight" not in stored
    assert {n for n, place in stored.items() if not place.lora_inputs} == {"lm_head.weight"}


def test_convolution_named_as_slot_keeps_its_weight(tmp_path):
    torch.manual_seed(0)
    make, inputs = GENERIC["cnn"]
    model = make().eval()
    options = {"example_inputs": inputs, "progress": False}
    export_bundle(model, tmp_path / "named", slot_names=["conv", "head"], **options)
    manifest = read_manifest(tmp_path / "named")
    assert manifest.stored["conv.weight"].operators == ("Conv",)
    assert manifest.slots["conv.weight"].kind == "conv"
    export_bundle(model, tmp_path / "default", **options)
    other = read_manifest(tmp_path / "default")
    assert list(other.slots) == ["head.weight"]
    assert other.fingerprint == manifest.fingerprint
    for feeds in cases("cnn", manifest):
        for out in ("named", "default"):
            found = run_graph(tmp_path / out, manifest, feeds)
            assert_same(found, run_torch(model, feeds))


def test_shapes_are_symbolic_and_the_config_is_complete(exported):
    name, model, out = exported
    manifest = read_manifest(out)
    if name not in LANGUAGE:
        assert all(spec.shape[0] == "batch" for spec in manifest.inputs)
        assert [spec.name for spec in manifest.inputs] == list(GENERIC[name][1])
        return
    shapes = {spec.name: spec.shape for spec in manifest.inputs}
    config = manifest.config
    heads, size = config["kv_heads"], config["head_dim"]
    assert shapes["input_ids"] == ("batch", "seq")
    assert shapes["attention_mask"] == ("batch", "total")
    assert shapes["past.1.value"] == ("batch", heads, "past", size)
    assert manifest.outputs[0].shape == ("batch", "seq", 96)
    assert (config["num_layers"], config["vocab_size"], config["context_length"]) == (2, 96, 64)
    canary = {
        k: torch.tensor(v["values"], dtype=torch.float if "past" in k else torch.long)
        for k, v in config["canary"].items()
    }
    feeds = {k: v.reshape(config["canary"][k]["shape"]) for k, v in canary.items()}
    assert_same(run_graph(out, manifest, feeds), run_torch(model, feeds))
