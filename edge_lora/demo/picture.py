"""The demo's result as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_lora.demo.run import DemoReport, SkillResult

COLUMNS = (
    "skill", "method", "file", "accuracy", "swap", "base", "fused", "unfused",
)  # fmt: skip


def table(report: DemoReport) -> list[tuple[str, ...]]:
    """Return the rows under ``COLUMNS``."""
    return [_row(result) for result in report.skills]


def _row(result: SkillResult) -> tuple[str, ...]:
    unfused = "-" if result.unfused_ms is None else f"{result.unfused_ms:.1f} ms"
    return (
        result.skill,
        result.method,
        f"{result.file_bytes / 1e6:.2f} MB",
        f"{result.base_accuracy:.0%} → {result.accuracy:.0%}",
        f"{result.swap_ms:.1f} ms",
        f"{result.base_ms:.1f} ms",
        f"{result.fused_ms:.1f} ms",
        unfused,
    )


def save_picture(report: DemoReport, path: Path) -> Path:
    """Draw accuracy, switching time and latency per skill, and write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    skills = [result.skill for result in report.skills]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    _bars(left, skills, {
        "base": [100 * r.base_accuracy for r in report.skills],
        "adapter fused": [100 * r.accuracy for r in report.skills],
    })  # fmt: skip
    left.set(title="Exact match on held-out examples", ylabel="%", ylim=(0, 105))
    _bars(middle, skills, {"base → skill": [r.swap_ms for r in report.skills]})
    middle.set(title=f"Switch, route {report.route}", ylabel="ms")
    _bars(right, skills, {
        "base": [r.base_ms for r in report.skills],
        "fused": [r.fused_ms for r in report.skills],
        "unfused": [r.unfused_ms for r in report.skills],
    })  # fmt: skip
    right.set(title="One run, 4 tokens", ylabel="ms")
    figure.suptitle(f"{report.device['processor']}, {report.device['cores']} cores")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _bars(axes: object, groups: list[str], series: Mapping[str, Sequence[float | None]]) -> None:
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        shift = (i - (len(series) - 1) / 2) * width
        known = {g + shift: value for g, value in enumerate(values) if value is not None}
        drawn = axes.bar(list(known), list(known.values()), width, label=name)  # type: ignore[attr-defined]
        axes.bar_label(drawn, fmt="%.3g", fontsize=8)  # type: ignore[attr-defined]
    axes.set_xticks(range(len(groups)), groups)  # type: ignore[attr-defined]
    if len(series) > 1:
        axes.legend(fontsize=8)  # type: ignore[attr-defined]
