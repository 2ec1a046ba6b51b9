"""The training loop: curves, resume to the bit, validation, schedules, refusals."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from edge_lora.errors import EdgeLoraError, UnknownNameError, UnsupportedError
from edge_lora.methods import attach, list_methods
from edge_lora.training import train


@pytest.fixture(autouse=True)
def _stay_on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def run(model, batches, method="shira", attach_config=None, **options):
    attached = attach(model, method, **(attach_config or {}))
    options = {"steps": 6, "lr": 5e-3, "cpu": True, **options}
    report = train(attached, batches, **options)
    state = attached.state_dict()
    attached.detach()
    return report, state


def test_loss_falls_and_is_recorded(tiny_llama, token_batches):
    was_training = tiny_llama.training
    report, _ = run(tiny_llama, token_batches[:2], "lora", steps=12)
    assert report.steps == list(range(1, 13))
    assert report.losses[-1] < report.losses[0] - 0.1
    assert report.seconds > 0
    assert tiny_llama.training == was_training
    assert json.loads(report.to_json())["losses"] == report.losses


def test_loop_equals_a_plain_loop_to_the_bit(tiny_llama, token_batches):
    _, state = run(tiny_llama, token_batches, schedule="constant", steps=5)
    attached = attach(tiny_llama, "shira")
    optimizer = torch.optim.AdamW(list(attached.parameters()), lr=5e-3, weight_decay=0.0)
    tiny_llama.train()
    for batch in token_batches[:5]:
        tiny_llama(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = attached.state_dict()
    assert all(torch.equal(state[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("method", list_methods())
def test_resumed_run_is_the_same_to_the_bit(method, tiny_llama, token_batches, tmp_path):
    config = {"mask": "line"} if method == "shira" else {"dropout": 0.3}
    options = {
        "attach_config": config, "steps": 9, "gradient_accumulation": 2, "warmup_steps": 2,
        "schedule": "cosine", "validation": token_batches[6:], "validate_every": 3, "seed": 5,
    }  # fmt: skip
    whole, wanted = run(tiny_llama, token_batches[:5], method, **options)
    options["checkpoint_dir"] = tmp_path
    for _ in range(2):
        run(tiny_llama, token_batches[:5], method, **options, stop_after=4)
        torch.rand(7)  # another user of the random generator between the sessions
    report, state = run(tiny_llama, token_batches[:5], method, **options)
    assert report.resumed_from == 8
    assert report.losses == whole.losses
    assert report.validation_losses == whole.validation_losses
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[k], wanted[k]) for k in wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]  # no leftovers


def test_accumulated_gradient_is_the_mean(tiny_llama, token_batches):
    both = {k: torch.cat([b[k] for b in token_batches[:2]]) for k in token_batches[0]}
    _, state = run(tiny_llama, token_batches[:2], steps=3, gradient_accumulation=2)
    _, wanted = run(tiny_llama, [both], steps=3)
    for key, value in wanted.items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-5)


def test_best_state_by_validation_is_kept(tiny_llama, token_batches):
    validation = token_batches[7:]
    attached = attach(tiny_llama, "shira", density=0.2)
    report = train(
        attached, token_batches[:1], steps=20, lr=0.1, validation=validation, validate_every=2,
        schedule="constant", cpu=True, progress=False,
    )  # fmt: skip
    assert report.best_validation_loss == min(report.validation_losses)
    assert (
        report.best_step
        == report.validation_steps[report.validation_losses.index(report.best_validation_loss)]
    )
    assert report.validation_losses[-1] > report.best_validation_loss  # it did overfit
    with torch.no_grad():
        loss = tiny_llama.eval()(**validation[0]).loss.item()
    assert loss == pytest.approx(report.best_validation_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(schedule, wanted):
    """With plain gradients of one, Adam moves by the learning rate itself."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    attached = attach(model, "shira", density=0.5)
    seen = []

    def loss(model, batch):
        seen.append(attached.lower(dtype="F32").deltas["0.weight"].forms[0].values[0].item())
        return model(batch).sum()

    train(attached, [torch.ones(1, 16)], steps=4, lr=1e-3, schedule=schedule, loss=loss, cpu=True)
    seen.append(attached.lower(dtype="F32").deltas["0.weight"].forms[0].values[0].item())
    moves = [(a - b) / 1e-3 for a, b in pairwise(seen)]
    assert moves == pytest.approx(wanted, rel=1e-3)


def test_warmup_rises_to_the_peak(tiny_llama, token_batches):
    """A third of the peak, two thirds, the peak: seen through the size of Adam's first steps."""
    slow, _ = run(tiny_llama, token_batches[:1], warmup_steps=2, steps=3)
    fast, _ = run(tiny_llama, token_batches[:1], steps=3)
    assert slow.losses[0] == fast.losses[0]
    assert slow.losses[1] > fast.losses[1]


def test_bf16_autocast_and_back_to_full_precision(tiny_llama, token_batches):
    full, _ = run(tiny_llama, token_batches)
    half, _ = run(tiny_llama, token_batches, mixed_precision="bf16")
    again, _ = run(tiny_llama, token_batches)
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=2e-2)
    assert again.losses == full.losses


def test_batchnorm_keeps_the_statistics_of_the_base():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attached = attach(model, "shira", slots=["*"], density=0.1)
    x, y = torch.randn(8, 3, 4, 4) + 3, torch.randint(2, (8,))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    report = train(attached, [(x, y)], steps=10, lr=1e-2, loss=loss, cpu=True)
    assert report.losses[-1] < report.losses[0]
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    attached.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_step_hooks_are_called_in_order(tiny_llama, token_batches):
    attached = attach(tiny_llama, "lora")
    calls = []
    attached.trained.before_step = lambda step: calls.append(("before", step))
    attached.trained.after_step = lambda step: calls.append(("after", step))
    train(attached, token_batches, steps=2, lr=1e-3, gradient_accumulation=2, cpu=True)
    assert calls == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]


def test_data_loader_and_its_epochs(tiny_llama, token_batches):
    loader = torch.utils.data.DataLoader(token_batches, batch_size=None)
    report, state = run(tiny_llama, loader, steps=10)
    plain, wanted = run(tiny_llama, token_batches, steps=10)
    assert report.losses == plain.losses
    assert all(torch.equal(state[k], wanted[k]) for k in wanted)


def test_plot_is_an_image(tiny_llama, token_batches, tmp_path):
    pytest.importorskip("matplotlib")
    report, _ = run(tiny_llama, token_batches, validation=token_batches[:1])
    path = report.save_plot(tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_printed_without_a_terminal(tiny_llama, token_batches, capfd):
    run(tiny_llama, token_batches, progress=True)
    assert capfd.readouterr() == ("", "")


# Refusals.


def test_checkpoint_of_another_run_is_refused(tiny_llama, token_batches, tmp_path):
    run(tiny_llama, token_batches, checkpoint_dir=tmp_path)
    with pytest.raises(UnsupportedError, match=r"lr was 0\.005, now 0\.1"):
        run(tiny_llama, token_batches, checkpoint_dir=tmp_path, lr=0.1)


def test_damaged_checkpoint_is_refused(tiny_llama, token_batches, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        run(tiny_llama, token_batches, checkpoint_dir=tmp_path)


def test_unknown_schedule(tiny_llama, token_batches):
    with pytest.raises(UnknownNameError, match=r"'cosin'.*'cosine'"):
        run(tiny_llama, token_batches, schedule="cosin")


@pytest.mark.parametrize("batches", [[], iter([])])
def test_empty_batches(batches, tiny_llama):
    with pytest.raises(EdgeLoraError, match="batches is empty"):
        run(tiny_llama, batches)


def test_diverging_loss_is_refused(tiny_llama, token_batches):
    with pytest.raises(UnsupportedError, match="loss is nan at step 1"):
        run(tiny_llama, token_batches, loss=lambda m, b: m(**b).loss * float("nan"))


def test_a_batch_without_labels_says_so(tiny_llama, token_batches):
    with pytest.raises(UnsupportedError, match="no loss"):
        run(tiny_llama, [{"input_ids": token_batches[0]["input_ids"]}])
