"""A session that picks the adapter of every run by its input."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, Dense
from edge_lora.bundle import read_manifest
from edge_lora.errors import AdapterMismatchError, BundleError, UnsupportedError
from edge_lora.scenario_classifier import Classifier, WindowFeatures
from edge_lora.scenarios import write_scenarios

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.torch, pytest.mark.ort]

from edge_lora.runtime import open_bundle  # noqa: E402

WINDOW, HORIZON = 16, 4
NAMES = ("low", "middle", "high")
LEVELS = {"low": -100.0, "middle": 0.0, "high": 100.0}


class Head(torch.nn.Module):
    """(batch, window, channels) to (batch, horizon, channels), one linear map."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(WINDOW, HORIZON, bias=False)

    def forward(self, x):
        return self.head(x.transpose(1, 2)).transpose(1, 2)


def by_level():
    """Return a classifier that tells a window's mean from -100, 0 and 100."""
    features = WindowFeatures(WINDOW, 4)
    weight = np.zeros((features.count, 3), np.float32)
    weight[features.count - 4] = (-20, 0, 20)  # the mean, in units of 50
    bias = np.array([-20, 0, -20], np.float32)
    ones = np.ones(features.count, np.float32)
    return Classifier(features, 0 * ones, 50 * ones, ((weight, bias),))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from edge_lora.export import export_bundle

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("scenarios") / "bundle"
    export_bundle(
        Head().eval(),
        folder,
        example_inputs={"x": torch.randn(3, WINDOW, 2)},
        dynamic_shapes={"x": {0: "batch", 2: "channels"}},
        progress=False,
    )
    return folder


def write_set(folder, bundle, names=NAMES, files=None, default="middle", fingerprint=None):
    """Write a set whose adapters add 1, 2, 3 to every weight."""
    manifest = read_manifest(bundle)
    folder.mkdir()
    (name,) = manifest.slots
    slot = manifest.slots[name]
    files = files or [f"adapter-{i}.safetensors" for i in range(len(names))]
    for i, file in enumerate(dict.fromkeys(files)):
        form = Dense(np.full(slot.shape, i + 1, np.float32))
        delta = Delta(slot.shape, slot.dtype, (form,), slot.slot_hash)
        base = BaseIdentity(manifest.fingerprint, manifest.base_id)
        Adapter(file, "made for tests", base, {name: delta}).save(folder / file)
    base = (manifest.base_id, fingerprint or manifest.fingerprint)
    write_scenarios(folder, list(zip(names, files, strict=True)), by_level(), base, default)
    return folder


@pytest.fixture(scope="module")
def scenarios(bundle, tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "set", bundle)


@pytest.fixture
def session(bundle, scenarios):
    with open_bundle(bundle, threads=1) as session:
        session.load_scenarios(scenarios)
        yield session


def windows(*names, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(names), WINDOW, 2)) + [[[LEVELS[n]]] for n in names]
    return {"x": x.astype(np.float32)}


def alone(session, name, feeds):
    """Run with one adapter set by name."""
    with session.using(name):
        return session.run(feeds)["output_0"]


def test_every_run_picks_by_its_own_input(session):
    expected = {n: alone(session, n, windows(n)) for n in NAMES}
    session.set_adapter("auto")
    assert session.active_adapters == {"middle": 1.0}
    for name in (*NAMES, "low"):
        np.testing.assert_array_equal(session.run(windows(name))["output_0"], expected[name])
        assert session.active_adapters == {name: 1.0}
    session.disable_adapters()
    assert session.differing_slots() == []
    assert session.active_adapters == {}


def test_a_batch_of_several_conditions_comes_back_in_order(session):
    asked = ["high", "low", "low", "middle", "high", "low"]
    feeds = windows(*asked)
    expected = {n: alone(session, n, feeds) for n in NAMES}
    session.set_adapter("auto")
    got = session.run(feeds)["output_0"]
    for row, name in enumerate(asked):
        np.testing.assert_allclose(got[row], expected[name][row], rtol=1e-5)
    assert session.choose(feeds).conditions == tuple(asked)


def test_nothing_is_switched_while_the_choice_stays(session, monkeypatch):
    session.set_adapter("auto")
    switched = []
    switch = session._live.switch
    monkeypatch.setattr(
        session._live, "switch", lambda *a, **k: switched.append(1) or switch(*a, **k)
    )
    for name in ("middle", "low", "low", "low", "high"):
        session.run(windows(name))
    assert len(switched) == 2
    session.run(windows("low", "high", "low"))  # begins with the one that is there
    assert len(switched) == 3


def test_the_choice_says_how_sure_it_is(session):
    choice = session.choose(windows("low", "high"))
    assert choice.conditions == ("low", "high")
    assert choice.names == NAMES
    np.testing.assert_allclose(choice.probabilities.sum(1), 1, rtol=1e-5)
    assert choice.probabilities[0, 0] > 0.99
    assert session.active_adapters == {}


def test_what_cannot_be_judged_gets_the_default(session):
    feeds = windows("high", "low")
    feeds["x"][0, 3, 1] = np.nan
    choice = session.choose(feeds)
    assert choice.conditions == ("middle", "low")
    assert np.isnan(choice.probabilities[0]).all()


@pytest.mark.parametrize("shape", [(0, WINDOW, 2), (2, WINDOW, 0)])
def test_a_batch_of_nothing_is_the_base_s(session, shape):
    feeds = {"x": np.zeros(shape, np.float32)}
    expected = session.run(feeds)["output_0"]
    session.set_adapter("auto")
    np.testing.assert_array_equal(session.run(feeds)["output_0"], expected)
    assert session.active_adapters == {"middle": 1.0}


def test_the_state_is_that_of_the_set_and_not_of_the_last_run(session):
    session.set_adapter("low")
    states = {session.state_id}
    session.set_adapter("auto")
    states.add(session.state_id)
    session.run(windows("low"))
    states.add(session.state_id)
    session.run(windows("high"))
    states.add(session.state_id)
    assert len(states) == 2


def test_auto_comes_back_after_a_block(session):
    session.set_adapter("auto")
    expected = session.run(windows("high"))["output_0"]
    with session.using("low"):
        assert session.active_adapters == {"low": 1.0}
        assert np.abs(session.run(windows("high"))["output_0"] - expected).max() > 1
    np.testing.assert_array_equal(session.run(windows("high"))["output_0"], expected)


def test_threads_never_see_the_adapter_of_another_run(session):
    """Runs that choose, and explicit switches: each output is of the right adapter, whole."""
    feeds = {n: windows(n, seed=i) for i, n in enumerate(NAMES)}
    mixed = windows(*NAMES, seed=7)
    right = {n: alone(session, n, feeds[n]) for n in NAMES}
    right_mixed = np.stack([alone(session, n, mixed)[i] for i, n in enumerate(NAMES)])
    fixed_mixed = alone(session, "low", mixed)
    fixed = {n: alone(session, "low", feeds[n]) for n in NAMES}
    session.set_adapter("auto")
    wrong = []

    def is_one_of(got, *wanted):
        return any(np.allclose(got, want, rtol=1e-5, atol=1e-4) for want in wanted)

    def choose(name):
        for _ in range(60):
            if not is_one_of(session.run(feeds[name])["output_0"], right[name], fixed[name]):
                wrong.append(name)
            if not is_one_of(session.run(mixed)["output_0"], right_mixed, fixed_mixed):
                wrong.append("mixed")

    def interrupt():
        for _ in range(20):
            session.set_adapter("low")
            session.set_adapter("auto")

    threads = [threading.Thread(target=choose, args=[n]) for n in NAMES]
    threads.append(threading.Thread(target=interrupt))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    session.disable_adapters()
    assert session.differing_slots() == []


def elsewhere(*calls):
    """Make calls in another thread."""
    thread = threading.Thread(target=lambda: [call() for call in calls])
    thread.start()
    thread.join()


def test_a_set_may_go_while_a_run_begins(session, monkeypatch):
    feeds = windows("low")
    base = session.run(feeds)["output_0"]
    session.set_adapter("auto")
    run = session._picking.run

    def late(*arguments):
        elsewhere(session.disable_adapters, session.delete_scenarios)
        return run(*arguments)

    monkeypatch.setattr(session._picking, "run", late)
    np.testing.assert_array_equal(session.run(feeds)["output_0"], base)


@pytest.mark.parametrize("asked", [["low"], ["low", "high"]])
def test_a_set_may_be_replaced_while_a_run_chooses(session, bundle, tmp_path, monkeypatch, asked):
    other = write_set(
        tmp_path / "other", bundle, names=("p", "q", "r"), default="p",
        files=["c.safetensors", "b.safetensors", "a.safetensors"],
    )  # fmt: skip
    feeds = windows(*asked)
    chosen = []
    old = session._picking.scenarios
    choose = old.choose

    def late(inputs):
        chosen.append(choose(inputs).conditions)
        elsewhere(
            session.disable_adapters, session.delete_scenarios,
            lambda: session.load_scenarios(other), lambda: session.set_adapter("auto"),
        )  # fmt: skip
        return choose(inputs)

    monkeypatch.setattr(old, "choose", late)
    session.set_adapter("auto")
    got = session.run(feeds)["output_0"]
    assert chosen == [tuple(asked)]
    for row, name in enumerate(asked):
        right = alone(session, {"low": "p", "high": "r"}[name], feeds)[row]
        np.testing.assert_allclose(got[row], right, rtol=1e-5)


def test_conditions_may_share_a_file(bundle, tmp_path):
    files = ["a.safetensors", "b.safetensors", "a.safetensors"]
    folder = write_set(tmp_path / "set", bundle, files=files)
    with open_bundle(bundle, threads=1) as session:
        assert session.load_scenarios(folder) == list(NAMES)
        session.set_adapter("auto")
        feeds = windows("high")
        got = session.run(feeds)["output_0"]
        assert session.active_adapters == {"high": 1.0}
        np.testing.assert_array_equal(got, alone(session, "low", feeds))


@dataclass
class Refused:
    use: object
    message: str
    error: type = UnsupportedError


@pytest.mark.parametrize(
    "case",
    [
        Refused(lambda s: s.set_adapter("auto", 0.5), "no weight, no rank"),
        Refused(lambda s: s.set_adapters(["auto", "low"]), "stands alone"),
        Refused(lambda s: s.delete_adapter("low"), "part of the scenario set"),
        Refused(lambda s: s.load_scenarios(s.folder), "not a scenario set", BundleError),
        Refused(lambda s: s.choose({"y": np.zeros(3)}), "'x' is missing"),
        Refused(
            lambda s: s.choose({"x": np.zeros((1, 9, 2), np.float32)}), r"must be \('batch', 16"
        ),
        Refused(lambda s: (s.set_adapter("auto"), s.delete_scenarios()), "'auto' is active"),
        Refused(lambda s: (s.set_adapter("low"), s.delete_scenarios()), "'low' is active"),
        Refused(lambda s: (s.set_adapter("auto"), s.io_binding().run()), "use that"),
    ],
    ids=lambda case: case.message,
)
def test_what_is_refused(session, case):
    with pytest.raises(case.error, match=case.message):
        case.use(session)


def test_a_set_is_loaded_once_and_can_be_taken_out(session, scenarios):
    with pytest.raises(UnsupportedError, match="is loaded; call delete_scenarios"):
        session.load_scenarios(scenarios)
    assert session.adapters == list(NAMES)
    session.delete_scenarios()
    assert session.adapters == []
    with pytest.raises(UnsupportedError, match="no scenario set"):
        session.set_adapter("auto")
    assert session.load_scenarios(scenarios) == list(NAMES)


def test_no_adapter_is_called_auto(session, scenarios):
    path = scenarios / "adapter-0.safetensors"
    with pytest.raises(UnsupportedError, match="cannot be named 'auto'"):
        session.load_adapter(path, "auto")


def test_a_name_that_is_taken_leaves_nothing_behind(bundle, scenarios):
    with open_bundle(bundle, threads=1) as session:
        session.load_adapter(scenarios / "adapter-1.safetensors", "high")
        with pytest.raises(UnsupportedError, match="'high' is loaded already"):
            session.load_scenarios(scenarios)
        assert session.adapters == ["high"]


def test_a_set_of_another_base_is_refused(bundle, tmp_path):
    folder = write_set(tmp_path / "set", bundle, fingerprint="0" * 64)
    with (
        open_bundle(bundle, threads=1) as session,
        pytest.raises(AdapterMismatchError, match="fingerprint 000000000000"),
    ):
        session.load_scenarios(folder)


def test_a_base_without_that_input_is_refused(mlp_bundle, scenarios):
    with (
        open_bundle(mlp_bundle, threads=1) as session,
        pytest.raises(AdapterMismatchError, match="no input 'x' to judge; inputs: input"),
    ):
        session.load_scenarios(scenarios)


def test_a_file_that_changed_is_refused(bundle, tmp_path):
    folder = write_set(tmp_path / "set", bundle)
    path = Path(folder / "adapter-1.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with (
        open_bundle(bundle, threads=1) as session,
        pytest.raises(BundleError, match=r"adapter-1\.safetensors has sha256"),
    ):
        session.load_scenarios(folder)


def test_only_one_of_several_threads_loads_a_set(bundle, scenarios, tmp_path):
    other = write_set(tmp_path / "other", bundle, names=("a", "b", "c"), default="a")
    with open_bundle(bundle, threads=1) as session:
        refused = []

        def load(folder):
            try:
                session.load_scenarios(folder)
            except UnsupportedError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=load, args=[f]) for f in (scenarios, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 1
        assert session.adapters in (list(NAMES), ["a", "b", "c"])
        session.delete_scenarios()
        assert session.adapters == []
