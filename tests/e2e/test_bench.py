"""The benchmark of a bundle: what it measures, what it writes, what it refuses."""

import csv
import json

import pytest
from click.testing import CliRunner

from edge_lora.cli import main
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.bench import bench_bundle
from edge_lora.runtime.bench.report import check_format, markdown, write_report

STEADY = {
    "steady/base",
    "steady/fused low",
    "steady/unfused low",
    "steady/fused few",  # a sparse adapter has no unfused form
}


@pytest.fixture(scope="module")
def adapters(make_mlp_adapter):
    return {"low": make_mlp_adapter("low_rank"), "few": make_mlp_adapter("sparse")}


@pytest.fixture(scope="module")
def report(mlp_bundle, adapters):
    return bench_bundle(mlp_bundle, adapters, threads=1, runs=50)


def test_every_phase_is_measured_apart_with_raw_samples(report):
    counts = {key: len(samples.ms) for key, samples in report.samples.items()}
    once = {"open/bundle", "load/low", "load/few"}
    assert {k for k in counts if k.startswith("steady")} == STEADY
    assert once < set(counts)
    for name in ("low", "few"):
        for key in (f"swap/base to {name}", f"swap/{name} to base", f"first run/{name}"):
            assert counts.pop(key) == 50
    assert counts.pop("churn/round robin") == 50
    assert {counts[key] for key in once} == {1}
    assert {counts[key] for key in STEADY} == {50}
    assert all(ms > 0 for samples in report.samples.values() for ms in samples.ms)


def test_percentiles_are_in_order_and_ratios_are_of_medians(report):
    base = report.samples["steady/base"].median
    for row in report.rows():
        points = [row[c] for c in ("min", "p50", "p90", "p95", "p99", "max")]
        assert points == sorted(points)
        if row["phase"] == "steady":
            assert row["vs_base"] == pytest.approx(row["p50"] / base)
        else:
            assert row["vs_base"] is None


def test_the_report_says_what_it_was_taken_on(report, adapters):
    context = report.context
    assert context["base_restored"] is True
    assert context["route"] == "packed"
    assert context["threads"] == 1
    assert context["adapters"].keys() == adapters.keys()
    assert context["device"].keys() >= {"processor", "cores", "onnxruntime", "commit"}
    assert report.memory.keys() == {"start", "base", "loaded", "end", "peak"}
    assert report.memory["peak"] >= report.memory["end"] > 0


def test_json_csv_markdown_and_html_hold_the_same_rows(report, tmp_path):
    paths = {
        e: write_report(report, tmp_path / f"bench.{e}") for e in ("json", "csv", "md", "html")
    }
    raw = json.loads(paths["json"].read_text())
    assert raw["samples_ms"]["steady/base"] == list(report.samples["steady/base"].ms)
    assert raw["context"]["image_sha256"] == report.context["image_sha256"]
    with paths["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["p50"]) for r in rows] == [r["p50"] for r in raw["rows"]]
    text, page = paths["md"].read_text(), paths["html"].read_text()
    assert text == markdown(report)
    for row in raw["rows"]:
        assert f"| {row['phase']} | {row['variant']} |" in text
        assert f"<td>{row['variant']}</td>" in page
    assert page.count("<svg") == len({row["phase"] for row in raw["rows"]})
    assert "http://" not in page  # self-contained
    assert "https://" not in page


def test_names_cannot_inject_markup(mlp_bundle, adapters, tmp_path):
    report = bench_bundle(mlp_bundle, {"<b>x": adapters["few"]}, threads=1)
    page = write_report(report, tmp_path / "bench.html").read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page


def test_too_few_runs_are_refused(mlp_bundle, adapters):
    with pytest.raises(UnsupportedError, match="49 runs are too few to tell; use at least 50"):
        bench_bundle(mlp_bundle, adapters, runs=49)
    with pytest.raises(UnsupportedError, match="at least one adapter"):
        bench_bundle(mlp_bundle, {})
    result = CliRunner().invoke(
        main, ["bench", str(mlp_bundle), str(adapters["few"]), "--runs", "49"]
    )
    assert result.exit_code == 2
    assert "49" in result.stderr


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=r"'.*x\.pdf': unknown ending; known: \.json, \.csv"):
        check_format(tmp_path / "x.pdf")


def test_the_command_prints_a_table_and_writes_files(mlp_bundle, adapters, tmp_path):
    out = tmp_path / "bench.csv"
    result = CliRunner().invoke(
        main, ["bench", str(mlp_bundle), f"few={adapters['few']}", "--threads", "1", "-o", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| phase | variant |")
    assert "Base restored: yes" in result.stdout
    assert "steady" in result.stderr
    assert f"wrote {out}" in result.stderr
    assert out.stat().st_size > 0


def test_the_command_prints_json(mlp_bundle, adapters):
    result = CliRunner().invoke(
        main, ["bench", str(mlp_bundle), f"few={adapters['few']}", "--route", "unpacked", "--json"]
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["context"]["route"] == "unpacked"
    assert len(facts["samples_ms"]["swap/base to few"]) == 50
