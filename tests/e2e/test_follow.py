"""Forecasts of a stream: the same as the session's and torch's, whatever else arrives."""

import csv
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
vega = pytest.importorskip("vega_datasets")

from click.testing import CliRunner  # noqa: E402

from edge_lora import Adapter, BaseIdentity, Delta, LowRank, reference  # noqa: E402
from edge_lora.bundle import read_manifest  # noqa: E402
from edge_lora.cli import main  # noqa: E402
from edge_lora.errors import UnsupportedError  # noqa: E402
from edge_lora.export import export_bundle  # noqa: E402
from edge_lora.runtime import open_bundle  # noqa: E402
from edge_lora.runtime.stream import Forecasts  # noqa: E402
from edge_lora.timeseries.bases import make_base  # noqa: E402

WINDOW, HORIZON, STEP = 24, 6, 3600.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("follow") / "bundle"
    base = make_base("linear", WINDOW, HORIZON)
    export_bundle(
        base, folder, example_inputs={"x": torch.randn(3, WINDOW, 2)},
        dynamic_shapes={"x": {0: "batch", 2: "channels"}}, slot_names=base.slots,
        base_id=base.id, progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def adapters(bundle, tmp_path_factory):
    """Return series -> an adapter file of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(bundle, folder / f"{name}.safetensors", i) for i, name in
            enumerate(["seattle", "san francisco", "pump", "fan", "door", "roof"])}  # fmt: skip


def make_adapter(bundle, path, seed, training=None):
    manifest = read_manifest(bundle)
    slot = manifest.slots["head.weight"]
    rng = np.random.default_rng(seed)
    form = LowRank(
        rng.standard_normal((2, WINDOW)).astype(np.float32),
        rng.standard_normal((2, HORIZON)).astype(np.float32) / WINDOW, 1.0,
    )  # fmt: skip
    return Adapter(
        name=path.stem,
        method="rslora",
        base=BaseIdentity(manifest.fingerprint, manifest.base_id),
        deltas={"head.weight": Delta(slot.shape, slot.dtype, (form,), slot.slot_hash)},
        provenance={"training": training} if training else {},
    ).save(path)


def by_torch(adapter, window):
    """Return torch's forecast of one window with an adapter in its weight."""
    base = make_base("linear", WINDOW, HORIZON)
    if adapter is not None:
        forms = [(form, 1.0) for form in Adapter.load(adapter).deltas["head.weight"].forms]
        weight = reference.apply(np.zeros((HORIZON, WINDOW), np.float32), forms)
        with torch.no_grad():
            base.head.weight.copy_(torch.from_numpy(weight))
    x = torch.tensor(np.asarray(window, np.float32))[None, :, None]
    return base(x).detach().numpy()[0, :, 0]


def temperatures(rows):
    """Return the first hours of two cities, in Fahrenheit."""
    hours = {"seattle": vega.data.seattle_temps(), "san francisco": vega.data.sf_temps()}
    return {name: frame["temp"].to_numpy(np.float32)[:rows] for name, frame in hours.items()}


def stream(series, label=lambda i: str(i * STEP)):
    """Return a wide file."""
    lines = ["time," + ",".join(series)]
    for i, row in enumerate(zip(*series.values(), strict=True)):
        lines.append(",".join([label(i), *map(str, row)]))
    return "\n".join(lines) + "\n"


def run(*arguments, text=None, ok=True):
    result = CliRunner().invoke(main, ["run", *map(str, arguments)], input=text)
    assert (result.exit_code == 0) == ok, result.stderr or result.exception
    return result


@pytest.fixture
def source(tmp_path):
    def write(text):
        path = tmp_path / "stream.csv"
        path.write_text(text)
        return path

    return write


def test_forecasts_equal_torch_s_and_the_session_s(bundle, adapters):
    cities = temperatures(WINDOW + 8)
    made = []
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(session, adapters)
        for i in range(WINDOW + 8):
            row = {name: float(values[i]) for name, values in cities.items()}
            made += stream_of.push_row(i * STEP, row)
        assert len(made) == 2 * 9
        for forecast in made:
            end = round(forecast.time / STEP) + 1
            window = cities[forecast.series][end - WINDOW : end]
            want = by_torch(adapters[forecast.series], window)
            np.testing.assert_allclose(forecast.values, want, rtol=2e-5)
            with session.using(str(adapters[forecast.series])):
                alone = session.run({"x": window[None, :, None]})["output_0"][0, :, 0]
            np.testing.assert_allclose(forecast.values, alone, rtol=1e-6)
        assert not np.allclose(made[0].values, made[1].values)


def test_series_of_one_adapter_are_one_run(bundle, adapters):
    rng = np.random.default_rng(0)
    series = {f"s{i}": rng.standard_normal(WINDOW).astype(np.float32) for i in range(50)}
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(session, {"s7": adapters["pump"], "*": adapters["fan"]})
        for i in range(WINDOW):
            made = stream_of.push_row(i * STEP, {n: float(v[i]) for n, v in series.items()})
        assert stream_of.counts.runs == 2
        assert stream_of.residents.loads == 2
    assert {forecast.series for forecast in made} == set(series)
    for forecast in made:
        path = adapters["pump" if forecast.series == "s7" else "fan"]
        np.testing.assert_allclose(
            forecast.values, by_torch(path, series[forecast.series]), rtol=2e-5, atol=2e-6
        )


def test_a_run_has_a_bounded_batch(bundle, adapters, monkeypatch):
    rng = np.random.default_rng(0)
    series = {f"s{i}": rng.standard_normal(WINDOW).astype(np.float32) for i in range(150)}
    sizes = []
    with open_bundle(bundle, threads=1) as session:
        run_session = session.run
        monkeypatch.setattr(session, "run", lambda x: sizes.append(len(x["x"])) or run_session(x))
        stream_of = Forecasts(session, {"*": adapters["fan"]})
        for i in range(WINDOW):
            made = stream_of.push_row(i * STEP, {n: float(v[i]) for n, v in series.items()})
    assert sizes == [64, 64, 22]
    assert [forecast.series for forecast in made] == list(series)
    for forecast in made:
        want = by_torch(adapters["fan"], series[forecast.series])
        np.testing.assert_allclose(forecast.values, want, rtol=2e-5, atol=2e-6)


def test_eviction_keeps_results_right_and_the_budget(bundle, adapters):
    rng = np.random.default_rng(1)
    series = {name: rng.standard_normal(WINDOW + 3).astype(np.float32) for name in adapters}
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(session, adapters, memory_bytes=8_000)
        for i in range(WINDOW + 3):
            made = stream_of.push_row(i * STEP, {n: float(v[i]) for n, v in series.items()})
            assert stream_of.nbytes <= 8_000
            assert len(session.adapters) == stream_of.residents.count < len(adapters)
            for forecast in made:
                window = series[forecast.series][i + 1 - WINDOW : i + 1]
                want = by_torch(adapters[forecast.series], window)
                np.testing.assert_allclose(forecast.values, want, rtol=2e-5, atol=2e-6)
        residents = stream_of.residents
        assert stream_of.counts.forecasts == 4 * len(adapters)
        assert residents.evictions == residents.loads - residents.count > len(adapters)
        assert residents.loads < stream_of.counts.forecasts  # those in memory had their turn first


def test_series_beyond_the_memory_are_left_out_and_said_once(bundle):
    told = []
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(
            session, memory_bytes=1000, on_problem=lambda *problem: told.append(problem)
        )
        for i in range(WINDOW):
            made = stream_of.push_row(i * STEP, dict.fromkeys(["a", "b", "c", "d"], float(i)))
        assert [forecast.series for forecast in made] == ["a", "b"]
        assert stream_of.counts.left_out == 2 * WINDOW
    assert [series for series, _ in told] == ["c"]
    assert "2 series fill 1,000 bytes" in told[0][1]


def test_windows_and_adapters_share_the_memory(bundle, adapters):
    told = []
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(
            session, {name: adapters[name] for name in ("pump", "fan", "door")},
            memory_bytes=16_000, on_problem=lambda *problem: told.append(problem),
        )  # fmt: skip
        for i in range(WINDOW):
            stream_of.push_row(i * STEP, dict.fromkeys(["pump", "fan", "door"], float(i)))
        before = stream_of.residents.count
        for i in range(WINDOW):  # on the base
            stream_of.push_row(i * STEP, {f"n{n}": float(i) for n in range(60)})
            assert stream_of.nbytes <= 16_000
        assert stream_of.residents.count < before
        stream_of.push_row(WINDOW * STEP, dict.fromkeys(["pump", "fan"], float(i)))
        assert stream_of.nbytes <= 16_000
        assert 20 < stream_of.series < 63
    assert len(told) == 1
    assert "fill 16,000 bytes" in told[0][1]


def test_names_of_series_that_are_refused_are_not_kept(bundle, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no adapter")
    told = []
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(
            session, {"*": broken}, on_problem=lambda *problem: told.append(problem)
        )
        for i in range(WINDOW):
            assert stream_of.push_row(i * STEP, {"a": 1.0, "b": 1.0}) == []
        stream_of.push("c", 0.0, 1.0)
        assert (stream_of.series, stream_of.window_bytes) == (0, 0)
        assert stream_of.counts.left_out == 1
    assert [series for series, _ in told] == ["a"]


def test_a_broken_adapter_costs_its_own_series_only(bundle, adapters, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no adapter")
    told = []
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(
            session, {"a": broken, "b": adapters["pump"]},
            on_problem=lambda *problem: told.append(problem),
        )  # fmt: skip
        made = []
        for i in range(WINDOW + 2):
            made += stream_of.push_row(i * STEP, {"a": float(i), "b": float(i)})
    assert {forecast.series for forecast in made} == {"b"}
    assert len(made) == 3
    ((series, what),) = told
    assert series == "a"
    assert str(broken) in what


def test_another_step_than_the_adapter_s_is_named_once(bundle, tmp_path):
    path = make_adapter(bundle, tmp_path / "hourly.safetensors", 0, {"step": 3600.0})
    told = []
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(
            session, {"*": path}, on_problem=lambda *problem: told.append(problem)
        )
        for i in range(WINDOW + 3):
            stream_of.push_row(i * 60.0, {"minutes": float(i)})
            stream_of.push_row(i * 3600.0, {"hours": float(i)})
    assert [series for series, _ in told] == ["minutes"]
    assert "rows every 60 s" in told[0][1]
    assert "every 3600 s" in told[0][1]


def test_a_later_step_is_compared_too(bundle, tmp_path):
    path = make_adapter(bundle, tmp_path / "minutes.safetensors", 0, {"step": 60.0})
    told, time = [], 0.0
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(
            session, {"*": path}, on_problem=lambda *problem: told.append(problem[1])
        )
        for step in (60.0, 7.0, 60.0, 7.0):
            for _ in range(WINDOW + 3):
                time += step
                stream_of.push("x", time, 1.0)
    steps = [what for what in told if "was trained on rows every 60 s" in what]
    assert [what.partition(",")[0] for what in steps] == ["has rows every 7 s"] * 2


@pytest.mark.parametrize("how", ["deleted", "rewritten"])
def test_a_file_that_goes_away_is_still_in_memory(bundle, tmp_path, how):
    path = make_adapter(bundle, tmp_path / "x.safetensors", 3, {"step": 60.0})
    again = make_adapter(bundle, tmp_path / "again.safetensors", 3)
    told, made = [], []
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(
            session, {"*": path}, on_problem=lambda *problem: told.append(problem)
        )
        for i in range(WINDOW):
            made += stream_of.push_row(i * 60.0, {"a": float(i)})
        path.unlink()
        if how == "rewritten":
            path.write_bytes(b"no adapter")
        for i in range(WINDOW):  # one that is there already, and one that is new
            made += stream_of.push_row((WINDOW + i) * 60.0, {"a": float(WINDOW + i), "b": float(i)})
    assert told == []
    assert [f.series for f in made] == ["a"] * (WINDOW + 1) + ["b"]
    np.testing.assert_allclose(made[-1].values, by_torch(again, np.arange(WINDOW)), rtol=1e-4)


@pytest.mark.parametrize("step", [1e300, -1, "60", None, 0])
def test_a_step_that_is_none_is_not_compared(bundle, tmp_path, step):
    path = make_adapter(bundle, tmp_path / "x.safetensors", 3, {"step": step})
    told = []
    with open_bundle(bundle, threads=1) as session:
        stream_of = Forecasts(
            session, {"*": path}, on_problem=lambda *problem: told.append(problem)
        )
        made = [stream_of.push("a", i * 60.0, 1.0) for i in range(WINDOW)]
    assert told == []
    assert made[-1] is not None


class TwoInputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x, y):
        return self.head(x) + self.head(y)


def test_a_bundle_that_forecasts_no_windows_is_refused(tmp_path):
    shape = torch.randn(2, 4)
    export_bundle(
        TwoInputs(), tmp_path / "two", example_inputs={"x": shape, "y": shape}, progress=False,
        slot_names=["head.weight"],
    )  # fmt: skip
    with (
        open_bundle(tmp_path / "two", threads=1) as session,
        pytest.raises(UnsupportedError, match="does not forecast windows of single series"),
    ):
        Forecasts(session)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(bundle, adapters, source, as_json):
    cities = temperatures(WINDOW + 4)
    path = source(stream(cities, lambda i: f"2010-01-{1 + i // 24:02d} {i % 24:02d}:00:00"))
    options = ["--json"] if as_json else []
    result = run(
        bundle, f"seattle={adapters['seattle']}", "--input", path, "--every", "2", *options
    )
    if as_json:
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        found = [(r["series"], r["time"], r["forecast"]) for r in rows]
    else:
        head, *rows = csv.reader(io.StringIO(result.stdout))
        assert head == ["series", "time", "1", "2", "3", "4", "5", "6"]
        found = [(name, time, [float(v) for v in values]) for name, time, *values in rows]
    assert [(name, time) for name, time, _ in found] == [
        (name, f"2010-01-{day} {hour}:00:00")
        for day, hour in (("01", "23"), ("02", "01"), ("02", "03"))
        for name in cities
    ]
    for i, (name, _, values) in enumerate(found):
        end = WINDOW + 2 * (i // 2)
        path = adapters["seattle"] if name == "seattle" else None
        np.testing.assert_allclose(values, by_torch(path, cities[name][end - WINDOW : end]), 2e-5)
    first, last = result.stderr.splitlines()
    assert first.startswith("series 'san francisco' has no adapter; it, and others")
    if as_json:
        facts = json.loads(last)
        assert (facts["series"], facts["forecasts"], facts["loads"]) == (2, 6, 1)
        assert facts["series_on_the_base"] == 1
        assert facts["process_bytes"] > facts["window_bytes"] > 2 * WINDOW * 4
    else:
        assert last.startswith("[2 series, 6 forecasts in 6 runs, 0 problems; adapters: 1 loads")


def test_a_folder_of_adapters_long_lines_and_names_that_count_first(bundle, adapters, source):
    folder = adapters["pump"].parent
    names = ["pump", "fan", "other"]
    lines = ["time,series,value"]
    rng = np.random.default_rng(2)
    series = {name: rng.standard_normal(WINDOW).round(3) for name in names}
    lines += [f"{i},{name},{series[name][i]}" for i in range(WINDOW) for name in names]
    result = run(
        bundle, "--input", source("\n".join(lines)), "--adapters", folder, "--json",
        f"fan={adapters['door']}", adapters["roof"],
    )  # fmt: skip
    used = {"pump": "pump", "fan": "door", "other": "roof"}
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["series"] for row in found] == names
    for row in found:
        want = by_torch(adapters[used[row["series"]]], series[row["series"]])
        np.testing.assert_allclose(row["forecast"], want, rtol=2e-5, atol=2e-6)


BAD = [
    ("x,1,1", "line 12: 'x' in column 'time' is not a time"),
    ("10,1", "line 12: 2 columns, the head line has 3"),
    ("10,1,1,1", "line 12: 4 columns, the head line has 3"),
    ("10,?,1", "line 12, series 'a': '?' is not a number"),
    ("10,nan,1", "line 12, series 'a': no value"),
    ("9,1,1", "line 12, series 'a': its time is not after the last one"),
    ("10,1e39,1", "line 12, series 'a': 1e+39 is not a number in fp32"),
    ("time,a,c", "line 12: the columns change here; new: 'c'; gone: 'b'"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_named_counted_or_the_end(bundle, source, line, message):
    before = [f"{i},1,{i}" for i in range(10)]  # lines 2 to 11
    after = [f"{i},1,{i}" for i in range(11, WINDOW * 2)]
    path = source("\n".join(["time,a,b", *before, line, *after]))
    told = run(bundle, "--input", path, "--json")
    assert message in told.stderr.splitlines()
    assert json.loads(told.stderr.splitlines()[-1])["problems"] >= 1
    assert '"series": "a"' in told.stdout
    counted = run(bundle, "--input", path, "--json", "--skip-bad")
    assert counted.stdout == told.stdout
    assert "line 12" not in counted.stderr
    assert json.loads(counted.stderr.splitlines()[-1])["problems"] >= 1
    stopped = run(bundle, "--input", path, "--strict", ok=False)
    assert stopped.exit_code == 1
    assert f"Error: {message}" in stopped.stderr


def test_a_gap_starts_the_window_anew_or_is_filled(bundle, source):
    times = [*range(WINDOW), *range(WINDOW + 2, 2 * WINDOW + 1)]
    path = source("time,a\n" + "".join(f"{t},{t}\n" for t in times))
    anew = run(bundle, "--input", path, "--json")
    assert len(anew.stdout.splitlines()) == 1
    assert (
        f"line {WINDOW + 2}, series 'a': 2 rows are missing before it; its window starts anew"
        in anew.stderr
    )
    filled = run(bundle, "--input", path, "--json", "--fill", "2")
    assert len(filled.stdout.splitlines()) == WINDOW
    last = json.loads(filled.stdout.splitlines()[-1])["forecast"]
    want = by_torch(None, np.arange(WINDOW + 1, 2 * WINDOW + 1))
    np.testing.assert_allclose(last, want, rtol=1e-5)


def test_a_flood_of_problems_is_cut_short(bundle, source):
    path = source("time,a\n0,1\n" + "x,1\n" * 50)
    result = run(bundle, "--input", path, ok=False)
    lines = result.stderr.splitlines()
    assert lines[:20] == [f"line {i}: 'x' in column 'time' is not a time" for i in range(3, 23)]
    assert sum(int(line.split()[2]) for line in lines if line.startswith("… and")) >= 10
    assert any("50 problems" in line for line in lines)
    assert result.exit_code == 1  # nothing came of it
    assert "ended without a forecast" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a=nowhere.safetensors"], "there is no file 'nowhere.safetensors'"),
        (["--memory", "much"], "'much' is no size; write one like 64MB"),
        (["--skip-bad", "--strict"], "exclude each other"),
    ],
)
def test_usage_errors(bundle, source, options, message):
    result = run(bundle, "--input", source("time,a\n"), *options, ok=False)
    assert result.exit_code == 2
    assert message in result.stderr


def test_forecasts_come_before_the_end_of_the_input(bundle, adapters):
    command = [
        sys.executable, "-c",
        "import sys; from edge_lora.cli import main; "
        "sys.addaudithook(lambda event, args: event == 'import' and args[0] == 'torch' "
        "and sys.exit('torch was imported')); main()",
        "run", str(bundle), str(adapters["pump"]), "--follow", "--json",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )  # fmt: skip
    try:
        process.stdin.write("time,a\n")
        for i in range(WINDOW - 1):
            process.stdin.write(f"{i},{i}\n")
        for i in range(WINDOW - 1, WINDOW + 3):
            process.stdin.write(f"{i},{i}\n")
            process.stdin.flush()
            line = json.loads(process.stdout.readline())  # would wait for ever if it came late
            assert line["time"] == str(i)
            want = by_torch(adapters["pump"], np.arange(i + 1 - WINDOW, i + 1))
            np.testing.assert_allclose(line["forecast"], want, rtol=1e-4)
        process.terminate()
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert out == ""
    assert json.loads(err.splitlines()[-1])["forecasts"] == 4


COMMAND = [sys.executable, "-m", "edge_lora", "run"]


def started(*arguments, **streams):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"}, **streams,
    )  # fmt: skip


def errors_of(process):
    """Wait for the end; return what it said on stderr."""
    try:
        return process.communicate(timeout=30)[1].splitlines()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_stream_that_never_waits(bundle, tmp_path, number):
    path = tmp_path / "long.csv"
    path.write_text("time,a\n" + "".join(f"{i},{i % 7}\n" for i in range(300_000)))
    process = started(bundle, "--input", path, "--json", stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(number)
    errors = errors_of(process)
    assert process.returncode == 0, errors
    assert 0 < json.loads(errors[-1])["forecasts"] < 299_000


def test_a_closed_input_is_one_line(bundle):
    process = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *COMMAND, str(bundle), "--follow"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == "Error: stdin is closed; name a file with --input"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(bundle, source):
    path = source("time,a\n0,1\n")
    with open("/dev/full", "w") as full:
        process = started(bundle, "--input", path, stdout=full)
        errors = errors_of(process)
    assert process.returncode == 1
    assert errors[-1] == "Error: forecasts cannot be written: No space left on device"
    assert not any("Traceback" in line or "Exception" in line for line in errors)


def test_a_named_pipe_is_followed_to_its_end(bundle, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    process = started(bundle, "--follow", "--input", path, "--json", stdout=subprocess.PIPE)
    with path.open("w") as pipe:
        pipe.write("time,a\n" + "".join(f"{i},{i}\n" for i in range(WINDOW)))
    out = process.stdout.readline()
    errors = errors_of(process)
    assert process.returncode == 0, errors
    assert json.loads(out)["series"] == "a"


def test_names_are_written_as_they_are_and_told_in_short(bundle, source):
    name = "\x1b[31mred\x1b[0m"
    rows = "".join(f"{i},{i},x\n" for i in range(WINDOW))
    result = run(bundle, "--input", source(f"time,{name},{'b' * 500}\n{rows}"))
    assert result.stdout.splitlines()[1].startswith(f"{name},{WINDOW - 1},")
    assert max(map(len, result.stderr.splitlines()[:5])) < 150
    assert "\x1b" not in result.stderr
