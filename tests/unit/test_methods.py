"""What every training method promises, parametrised over the table of methods."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edge_lora import Adapter, Sparse, reference
from edge_lora.errors import EdgeLoraError, UnknownNameError, UnsupportedError
from edge_lora.forms import Bottleneck, to_fp32
from edge_lora.methods import attach, find_weights, list_methods

CASES = [(method, {}) for method in list_methods()] + [
    ("shira", {"trainer": "masked"}),
    ("shira", {"mask": "line"}),
    ("shira", {"mask": "struct", "density": 0.1}),
    ("bilora", {"bits": 4, "group": 100}),
    ("biadaptformer", {"bits": None, "act": "gelu"}),
    ("biadaptformer", {"bits": 2, "placement": "sequential", "slots": ["*.[01]"], "scale": 10.0}),
]
STARTS_BESIDE_THE_BASE = {"bilora", "biadaptformer"}
"""Methods whose adapter cannot be zero at first: codes of equal values all decode to zero."""
IDS = ["-".join([m, *map(str, c.values())]) for m, c in CASES]


def a_few_steps(attached, batches, lr=1e-2):
    optimizer = torch.optim.AdamW(list(attached.parameters()), lr=lr, weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = attached.model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_untouched(model, before):
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def bottleneck(form, x, y):
    """The network beside a site, in NumPy: x and y are the site's input and output."""
    act = {
        "none": lambda h: h,
        "relu": lambda h: np.maximum(h, 0),
        "gelu": lambda h: h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2,
    }[form.act]
    z = x if form.placement == "parallel" else y
    return y + form.scale * act(z @ to_fp32(form.down).T) @ to_fp32(form.up).T


def fused(model, adapter):
    """Write an adapter into the weights, or beside them, by NumPy alone."""
    weights = find_weights(model)
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            if isinstance(delta.forms[0], Bottleneck):
                model.get_submodule(name).register_forward_hook(
                    lambda _, inputs, y, form=delta.forms[0]: torch.from_numpy(
                        bottleneck(form, inputs[0].numpy(), y.numpy()).astype(np.float32)
                    )
                )
                continue
            tensor = weights[name].tensor
            terms = [(form, adapter.alpha) for form in delta.forms]
            new = reference.apply(np.ascontiguousarray(tensor.float().numpy()), terms)
            tensor.copy_(torch.from_numpy(new))
    return model


@pytest.mark.parametrize(("method", "config"), CASES, ids=IDS)
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_lower_is_what_the_model_computes_and_detach_restores(
    method, config, family, request, token_batches, tmp_path
):
    model = request.getfixturevalue(family)
    before, modules = snapshot(model), list(model.modules())
    base_logits = model(**token_batches[0]).logits.detach()
    attached = attach(model, method, **config)
    first = model(**token_batches[0]).logits.detach()  # nothing learned yet
    assert (first - base_logits).abs().max() <= (0.05 if method in STARTS_BESIDE_THE_BASE else 0)
    losses = a_few_steps(attached, token_batches[:1] * 6)
    assert losses[-1] < losses[0]
    trained_logits = model(**token_batches[0]).logits.detach()
    adapter = attached.lower("skill", dtype="F32")
    assert attached.detach() is model
    assert_untouched(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(**token_batches[0]).logits, base_logits)

    read = Adapter.load(adapter.save(tmp_path / "skill.safetensors"))
    attached.slots.check(read)
    assert read.content_hash == adapter.content_hash
    with torch.no_grad():
        logits = fused(model, read)(**token_batches[0]).logits
    assert (trained_logits - base_logits).abs().max() > 1e-2
    torch.testing.assert_close(logits, trained_logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(method, dtype, tiny_llama, token_batches):
    model = tiny_llama.to(dtype)
    before = snapshot(model)
    attached = attach(model, method)
    losses = a_few_steps(attached, token_batches[:1] * 6)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in attached.parameters()} == {torch.float32}
    attached.detach()
    assert_untouched(model, before)


@pytest.mark.parametrize(("method", "config"), CASES, ids=IDS)
def test_state_round_trip(method, config, tiny_llama, token_batches):
    attached = attach(tiny_llama, method, **config)
    a_few_steps(attached, token_batches[:3])
    logits = tiny_llama(**token_batches[0]).logits.detach()
    state = attached.state_dict()
    attached.detach()
    other = attach(tiny_llama, method, **{**config, "seed": 9})
    other.load_state_dict(state)
    assert torch.equal(tiny_llama(**token_batches[0]).logits, logits)
    loaded = other.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_state_of_another_attachment_is_refused(tiny_llama):
    state = attach(tiny_llama, "lora", slots=["*.q_proj"]).state_dict()
    twin = type(tiny_llama)(tiny_llama.config)
    attached = attach(twin, "lora", slots=["*.k_proj"])
    with pytest.raises(UnsupportedError, match="missing"):
        attached.load_state_dict(state)


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 8))
    attached = attach(model, method, ["0", "2"])
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(std=0.1)
    x = torch.randn(5, 24, requires_grad=True)

    def gradients(forward):
        forward(x).square().sum().backward()
        result = [p.grad.clone() for p in attached.parameters()]
        for parameter in attached.parameters():
            parameter.grad = None
        return result

    plain = gradients(model)
    recomputed = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for a, b in zip(recomputed, plain, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", list_methods())
def test_autocast_and_accumulation(method, tiny_llama, token_batches):
    attached = attach(tiny_llama, method)
    a_few_steps(attached, token_batches[:1])
    exact, cast = [], []
    for batch in token_batches[:2]:
        tiny_llama(**batch).loss.backward()
    for parameter in attached.parameters():
        exact.append(parameter.grad.clone())
        parameter.grad = None
    for batch in token_batches[:2]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = tiny_llama(**batch).loss
        loss.backward()
    cast = [p.grad for p in attached.parameters()]
    exact, cast = torch.cat([g.flatten() for g in exact]), torch.cat([g.flatten() for g in cast])
    assert (exact - cast).norm() < 0.05 * exact.norm()


def test_flags_and_buffers_come_back():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)).train()
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = snapshot(model)
    attached = attach(model, "shira", density=0.1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 0
    model(torch.randn(8, 16)).sum().backward()
    attached.detach()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_untouched(model, before)


def test_convolutions_get_the_dense_gradient_at_their_mask():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, groups=4, bias=False), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    x = torch.randn(2, 4, 8, 8)
    model(x).square().sum().backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    attached = attach(model, "shira", slots=["*"], density=0.2)
    model(x).square().sum().backward()
    values = {slot.weight[0].name: slot for slot in attached.trained.slots.values()}
    assert sorted(values) == ["0.weight", "2.weight", "4.weight"]
    for name, slot in values.items():
        wanted = dense[name].flatten()[slot.positions.long()]
        torch.testing.assert_close(slot.values.grad, wanted)


def test_large_weights_are_sampled_in_blocks_of_rows(monkeypatch, tiny_gpt2, token_batches):
    attached = attach(tiny_gpt2, "shira")
    tiny_gpt2(**token_batches[0]).loss.backward()
    whole = [p.grad.clone() for p in attached.parameters()]
    attached.detach()
    monkeypatch.setattr("edge_lora.methods.sparse_values._SCRATCH_ENTRIES", 300)
    attached = attach(tiny_gpt2, "shira")
    tiny_gpt2(**token_batches[0]).loss.backward()
    for a, b in zip(attached.parameters(), whole, strict=True):
        torch.testing.assert_close(a.grad, b)


def test_calibrated_masks_use_the_summed_gradient(tiny_llama, token_batches):
    name = "model.layers.1.self_attn.o_proj.weight"
    weight = tiny_llama.get_parameter(name)
    for batch in token_batches:
        tiny_llama(**batch).loss.backward()
    total = weight.grad.clone()
    tiny_llama.zero_grad()
    attached = attach(
        tiny_llama, "shira", slots=[name], mask="grad", calibration=token_batches, density=0.01
    )
    (slot,) = attached.trained.slots.values()
    wanted = total.abs().flatten().topk(41).indices.sort().values
    assert slot.positions.tolist() == wanted.tolist()


def test_calibration_in_groups_chooses_the_same(monkeypatch, tiny_llama, token_batches):
    config = {"mask": "line-snip", "calibration": token_batches[:2]}
    attached = attach(tiny_llama, "shira", **config)
    one_pass = {k: v for k, v in attached.state_dict().items() if k.endswith("positions")}
    attached.detach()
    monkeypatch.setattr("edge_lora.methods.calibration._ACCUMULATOR_BYTES", 1)
    attached = attach(tiny_llama, "shira", **config)
    many = attached.state_dict()
    assert all(torch.equal(v, many[k]) for k, v in one_pass.items())


def test_delta_of_random_shira_has_full_rank_and_lora_has_not(tiny_llama, token_batches):
    ranks = {}
    for method, config in (("shira", {"density": 4 * 128 / 4096}), ("lora", {"rank": 4})):
        attached = attach(tiny_llama, method, slots=["*.q_proj"], **config)
        a_few_steps(attached, token_batches)
        delta = attached.lower(dtype="F32").deltas["model.layers.0.self_attn.q_proj.weight"]
        dense = reference.delta_of(delta.forms[0], np.zeros(delta.shape, np.float32))
        ranks[method] = int(np.linalg.matrix_rank(dense, tol=1e-6))
        attached.detach()
    assert ranks == {"shira": 64, "lora": 4}


def test_lower_rounds_once_and_says_what_it_came_from(tiny_llama, token_batches):
    attached = attach(tiny_llama, "shira", density=0.02, seed=7)
    a_few_steps(attached, token_batches[:2])
    exact, half = attached.lower(dtype="F32"), attached.lower()
    for name, delta in exact.deltas.items():
        (sparse,), (rounded,) = delta.forms, half.deltas[name].forms
        assert isinstance(rounded, Sparse)
        assert rounded.values.dtype == np.float16
        assert np.array_equal(sparse.values.astype(np.float16), rounded.values)
    assert half.provenance["config"]["seed"] == 7
    assert "calibration" not in half.provenance["config"]
    assert half.provenance["parameters"] == attached.parameter_count
    assert half.base.fingerprint == attached.slots.fingerprint


# Refusals: one clear error, and the model is as it was.


def test_unknown_method_lists_the_known_ones(tiny_llama):
    with pytest.raises(
        UnknownNameError, match=r"unknown method 'shir'.*'shira'.*lora, matryoshka, rslora"
    ):
        attach(tiny_llama, "shir")


@pytest.mark.parametrize("method", list_methods())
def test_unknown_option_lists_the_known_ones(method, tiny_llama):
    with pytest.raises(UnknownNameError, match=r"unknown option of .*'sede'.*'seed'"):
        attach(tiny_llama, method, sede=1)


def test_unknown_mask_lists_the_known_ones(tiny_llama):
    with pytest.raises(UnknownNameError, match=r"unknown mask 'ran'.*'rand'.*line-snip"):
        attach(tiny_llama, "shira", mask="ran")


def test_unknown_slot_pattern_suggests(tiny_llama):
    with pytest.raises(UnknownNameError, match=r"q_projj.*'q_proj' \(2\)"):
        attach(tiny_llama, "lora", slots=["*.q_projj"])


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("shira", {"density": 0.0}, "density is 0.0"),
        ("shira", {"mask": "snip"}, "pass calibration"),
        ("lora", {"rank": 0}, "rank is 0"),
        ("lora", {"dropout": 1.0}, "dropout is 1.0"),
        ("dora", {"rank": "8", "alpha": None}, "rank is '8'.*alpha is None, must be finite"),
        ("bilora", {"bits": 3, "group": 0}, "bits is 3, must be one of 1, 2, 4, 8; group is 0"),
        ("bilora", {"scale": float("nan")}, "scale is nan"),
        ("biadaptformer", {"act": "swish", "bits": 5}, "bits is 5.*act is 'swish'.*gelu_tanh"),
    ],
)
def test_impossible_options(method, config, message, tiny_llama):
    with pytest.raises(UnsupportedError, match=message):
        attach(tiny_llama, method, **config)


def test_line_masks_refuse_odd_outputs_by_name_and_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 10))
    with pytest.raises(UnsupportedError, match=r"1 of 2 slots[\s\S]*1\.weight: 10 outputs"):
        attach(model, "shira", mask="line")
    assert all(p.requires_grad for p in model.parameters())
    attach(model, "shira", mask="line", slots=["0"]).detach()


def test_a_model_is_adapted_once(tiny_llama):
    attached = attach(tiny_llama, "lora")
    with pytest.raises(EdgeLoraError, match="adapted already"):
        attach(tiny_llama, "shira")
    attached.detach()
    for late in (attached.detach, attached.lower):
        with pytest.raises(EdgeLoraError, match="already detached"):
            late()
    attach(tiny_llama, "shira")


def test_values_refuse_modules_of_their_own_kind_and_masked_takes_them(tiny_gpt2, token_batches):
    with pytest.raises(UnsupportedError, match=r"wte\.weight: read by a Embedding"):
        attach(tiny_gpt2, "shira", slots=["*.wte"])
    attached = attach(tiny_gpt2, "shira", slots=["*.wte"], trainer="masked")
    a_few_steps(attached, token_batches[:2])
    assert list(attached.lower().deltas) == ["transformer.wte.weight"]


def test_values_that_overflow_the_dtype_are_refused_by_name(tiny_llama):
    attached = attach(tiny_llama, "shira", slots=["*.0.*.q_proj"])
    with torch.no_grad():
        next(attached.parameters())[0] = 1e6
    with pytest.raises(UnsupportedError, match=r"not finite in F16[\s\S]*q_proj"):
        attached.lower()
    attached.lower(dtype="F32")


def test_masked_trainer_notices_weight_decay(tiny_llama, token_batches):
    attached = attach(tiny_llama, "shira", slots=["*.q_proj"], trainer="masked")
    before = snapshot(tiny_llama)
    optimizer = torch.optim.AdamW(list(attached.parameters()), lr=0.01, weight_decay=0.1)
    tiny_llama(**token_batches[0]).loss.backward()
    optimizer.step()
    with pytest.raises(UnsupportedError, match="weight_decay=0"):
        attached.lower()
    attached.detach()
    assert_untouched(tiny_llama, before)
