"""A benchmark as CSV, Markdown and one self-contained page with plots."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.bench.bundle_bench import BenchReport
from edge_lora.runtime.bench.measure import Samples

_COLUMNS = ("phase", "variant", "runs", "p50", "p90", "p95", "p99", "min", "max", "vs_base")
_STYLE = """body{font:15px system-ui;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}svg text{font:12px system-ui}
pre{background:#f6f6f6;padding:1em;overflow:auto}"""


def check_format(path: Path) -> None:
    """Raise UnsupportedError if a report cannot be written to ``path``; before hours are spent."""
    if path.suffix not in _WRITERS:
        raise UnsupportedError(f"'{path}': unknown ending; known: {', '.join(_WRITERS)}")


def write_report(report: BenchReport, path: Path) -> Path:
    """Write ``report`` in the format that the file's ending names: .json, .csv, .md or .html."""
    check_format(path)
    path.write_text(_WRITERS[path.suffix](report), encoding="utf-8")
    return path


def _rounding(errors: Mapping[str, float]) -> list[str]:
    """Say what 8-bit weights took from adapters, if there are any."""
    told = [f"{name} {error:.1%}" for name, error in errors.items() if error]
    return [f"Taken from the adapters by rounding to 8 bits: {', '.join(told)}."] if told else []


def markdown(report: BenchReport) -> str:
    """Return the table as Markdown, times in ms."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join(_cell(row[c]) for c in _COLUMNS)} |" for row in report.rows()]
    context = report.context
    where, engine = context["device"], context["engine"]
    lines += [
        "",
        f"Times in ms. {where['processor']}, {where['cores']} cores, {where['system']}, "
        f"{engine} {where[engine]}, route {context['route']}, commit {where['commit']}.",
        *_rounding(context["rounding_error"]),
        f"Base restored: {'yes' if context['base_restored'] else 'NO'}, "
        f"sha256 {context['image_sha256'][:16]}….",
        "Memory (anonymous, MiB): "
        + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in report.memory.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _json(report: BenchReport) -> str:
    return json.dumps(report.to_json(), indent=1)


def _csv(report: BenchReport) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS)
    writer.writeheader()
    writer.writerows(report.rows())
    return out.getvalue()


def _html(report: BenchReport) -> str:
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(_cell(row[c]))}</td>' for c in _COLUMNS)}</tr>"
        for row in report.rows()
    )
    heads = "".join(f"<th>{c}</th>" for c in _COLUMNS)
    phases = dict.fromkeys(key.split("/")[0] for key in report.samples)
    plots = "".join(_plot(phase, _of_phase(report, phase)) for phase in phases)
    context = html.escape(
        json.dumps({**report.context, "memory_bytes": dict(report.memory)}, indent=1)
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>edge-lora bench</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(str(report.context['bundle']))}</h1>"
        "<p>Times in ms; a bar spans 5 % to 95 %, the mark is the median, dots are single runs."
        "</p>"
        f"{plots}<table><tr>{heads}</tr>{rows}</table><pre>{context}</pre></html>"
    )


def _of_phase(report: BenchReport, phase: str) -> list[tuple[str, Samples]]:
    return [(k.split("/", 1)[1], s) for k, s in report.samples.items() if k.startswith(phase + "/")]


def _plot(title: str, series: Sequence[tuple[str, Samples]]) -> str:
    """Return one phase as an SVG: a line of dots, a bar and a median per variant."""
    left, width, row = 190, 560, 26
    most = max(s.summary()["p99"] for _, s in series) * 1.05 or 1.0
    shapes = []
    for i, (name, samples) in enumerate(series):
        y = 14 + i * row
        low, high = (float(_quantile(samples, q)) for q in (0.05, 0.95))
        x = [left + min(v / most, 1.0) * width for v in (low, high, samples.median)]
        shapes.append(
            f"<text x={left - 8} y={y + 4} text-anchor=end>{html.escape(name)}</text>"
            f"<rect x={x[0]:.1f} y={y - 7} width={max(x[1] - x[0], 1):.1f} height=14 "
            "fill=#9cc9ee />"
            f"<rect x={x[2] - 1:.1f} y={y - 9} width=2 height=18 fill=#124d7c />"
            f"<text x={left + width + 8} y={y + 4}>{samples.median:.3g} ms</text>"
        )
        shapes += [
            f"<circle cx={left + v / most * width:.1f} cy={y} r=1.2 "
            "fill=#124d7c fill-opacity=.35 />"
            for v in samples.ms
            if v <= most
        ]
    height = len(series) * row + 6
    return (
        f"<h2>{html.escape(title)}</h2>"
        f"<svg viewBox='0 0 {left + width + 90} {height}' width=100% role=img>"
        f"{''.join(shapes)}</svg>"
    )


def _quantile(samples: Samples, q: float) -> float:
    ordered = sorted(samples.ms)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_WRITERS = {".json": _json, ".csv": _csv, ".md": markdown, ".html": _html}
