"""Every training method in a live session: what was trained is what runs, fused and unfused."""

import numpy as np
import pytest

from edge_lora.runtime import open_bundle

torch = pytest.importorskip("torch")

from edge_lora.methods import attach, list_methods  # noqa: E402

NEVER_FUSED, NEVER_UNFUSED = {"biadaptformer"}, {"shira"}


@pytest.fixture(scope="module")
def session(torch_model, tmp_path_factory):
    from edge_lora.export import export_bundle

    folder = tmp_path_factory.mktemp("trained") / "bundle"
    export_bundle(
        torch_model, folder, task="causal-lm", slots="inputs", sites=["*.mlp"],
        slot_forms=("low_rank", "row_scale"), progress=False,
    )  # fmt: skip
    with open_bundle(folder, threads=2) as opened:
        yield opened
        assert opened.differing_slots() == []


def trained(model, method, ids):
    """Return an adapter after a few steps, and what torch computes with it."""
    attached = attach(model, method, rank=4) if method != "shira" else attach(model, method)
    optimizer = torch.optim.AdamW(list(attached.parameters()), lr=2e-2, weight_decay=0.0)
    for step in range(4):
        attached.before_step(step)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step(step)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.numpy()
    adapter = attached.lower(method, dtype="F32")
    attached.detach()
    return adapter, logits


@pytest.mark.parametrize("method", list_methods())
def test_a_trained_adapter_runs_as_in_torch(method, session, torch_model, feeds, tmp_path):
    ids = torch.from_numpy(feeds["input_ids"])
    base = session.run(feeds)["logits"]
    adapter, wanted = trained(torch_model, method, ids)
    assert np.abs(wanted - base).max() > 0.05
    session.load_adapter(adapter.save(tmp_path / "skill.safetensors"), method)
    runs = {}
    if method not in NEVER_UNFUSED:
        runs["unfused"] = session.run(feeds, adapter=method)["logits"]
    if method not in NEVER_FUSED:
        with session.using(method):
            runs["fused"] = session.run(feeds)["logits"]
    assert runs
    for how, logits in runs.items():
        error = np.abs(logits - wanted).max() / np.abs(wanted - base).max()
        assert error < 1e-3, (how, error)
    assert session.run(feeds)["logits"].tobytes() == base.tobytes()
