"""A plot of a forecast as one self-contained page: inline SVG, light and dark, for phones too."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_lora.timeseries.metrics import Errors
    from edge_lora.timeseries.plots import Example, Picture

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 210, 48, 22, 8  # of a drawing, in its own units
Lines = Sequence[tuple[str, range, Sequence[float] | NDArray[np.floating[Any]]]]
"""(class, x, y) of each line; the last lies on top."""
_STYLE = """:root{color-scheme:light dark;--back:#fff;--text:#222;--grid:#ddd;--truth:#111;
--c0:#c8472f;--c1:#2f6fb5;--c2:#4f9a4f;--c3:#8a5fb0;--c4:#b08a2f;--c5:#5f8f8f;--c6:#888}
@media(prefers-color-scheme:dark){:root{--back:#16181c;--text:#ddd;--grid:#3a3d44;--truth:#f2f2f2;
--c0:#ff8a6b;--c1:#7db4f0;--c2:#8fd08f;--c3:#c9a5ea;--c4:#e0bf6a;--c5:#9fcfcf;--c6:#aaa}}
body{font:15px/1.45 system-ui,sans-serif;background:var(--back);color:var(--text);
max-width:90em;margin:0 auto;padding:1em}
h1{font-size:1.3em}h2{font-size:1.05em;margin:1.2em 0 .2em}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19em),1fr));gap:.6em}
svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--text)}
path{fill:none;stroke-width:1.1;stroke-linejoin:round}path.c0{stroke-width:2.2}
.grid{stroke:var(--grid);stroke-width:1}.now{stroke:var(--text);stroke-dasharray:2 3}
.truth{stroke:var(--truth)}.hit{fill:transparent}.hit:hover{fill:var(--grid);fill-opacity:.6}
.key span{display:inline-block;margin-right:1.2em}.key i{display:inline-block;width:1.6em;
height:.2em;margin-right:.4em;vertical-align:middle}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid var(--grid)}
""" + "".join(f".c{i}{{stroke:var(--c{i})}}" for i in range(7))


def page(found: Picture) -> str:
    """Return the page; it needs no network and no script."""
    title = html.escape(found.title)
    colours = {name: f"c{i % 7}" for i, name in enumerate(found.errors)}
    columns = "".join(
        f"<h2>{html.escape(examples[0].column)}</h2><div class=row>"
        f"{''.join(_example(example, colours) for example in examples)}</div>"
        for examples in found.examples
    )
    drawn = {name: colours[name] for name in found.examples[0][0].forecasts}
    curves = "".join(
        f"<div><h2>Test {kind.upper()} by rows ahead, scaled data</h2>"
        f"{_curve(found.errors, kind, colours)}</div>"
        for kind in ("mse", "mae")
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f"<p>{html.escape(found.caption)}</p>{_key({'truth': 'truth', **drawn})}{columns}"
        f"<div class=row>{curves}</div>{_key(colours)}"
        f"<details open><summary>Errors by rows ahead</summary>{_table(found.errors)}</details>"
        "</html>"
    )


def _example(example: Example, colours: Mapping[str, str]) -> str:
    past, ahead = len(example.past), len(example.truth)
    x = range(past, past + ahead)
    lines: Lines = [(colours[name], x, values) for name, values in example.forecasts.items()]
    truth = ("truth", range(past + ahead), [*example.past, *example.truth])
    hits = [
        f"{_time(example.times[past + i])}: truth {example.truth[i]:.5g}"
        + "".join(f", {name} {values[i]:.5g}" for name, values in example.forecasts.items())
        for i in range(ahead)
    ]
    marks = {0: _time(example.times[0]), past: _time(example.times[past])}
    return _drawing([truth, *lines[::-1]], marks, hits, past, zero=False)


def _curve(errors: Mapping[str, Errors], kind: str, colours: Mapping[str, str]) -> str:
    curves = {
        name: one.mse_by_step if kind == "mse" else one.mae_by_step for name, one in errors.items()
    }
    steps = len(next(iter(curves.values())))
    lines = [(colours[name], range(1, steps + 1), values) for name, values in curves.items()]
    hits = [
        f"{i + 1} ahead: " + ", ".join(f"{name} {values[i]:.4f}" for name, values in curves.items())
        for i in range(steps)
    ]
    marks = {step: str(step) for step in {1, (steps + 1) // 2, steps}}
    return _drawing(lines[::-1], marks, hits, 1, zero=True)


def _drawing(
    lines: Lines, marks: Mapping[int, str], hits: Sequence[str], first: int, *, zero: bool
) -> str:
    """Return an SVG of lines over whole x; ``hits`` are what hovering from ``first`` on tells."""
    xs = np.concatenate([np.asarray(x, np.float64) for _, x, _ in lines])
    ys = np.concatenate([np.asarray(y, np.float64) for _, _, y in lines])
    left, right = float(xs.min()), float(max(xs.max(), xs.min() + 1))
    low, high = _range(ys, zero=zero)
    across = (WIDTH - LEFT - 4) / (right - left)
    up = (HEIGHT - TOP - BOTTOM) / (high - low)

    def at(x: float) -> float:
        return LEFT + (x - left) * across

    def height(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) * up

    ticks = _ticks(low, high)
    parts = [
        f"<line class=grid x1={LEFT} x2={WIDTH} y1={height(tick):.1f} y2={height(tick):.1f} />"
        f"<text x={LEFT - 5} y={height(tick) + 4:.1f} text-anchor=end>{label}</text>"
        for tick, label in zip(ticks, _labels(ticks), strict=True)
    ]
    for x, label in sorted(marks.items()):
        anchor = "start" if at(x) < WIDTH * 0.75 else "end"
        parts.append(
            f"<text x={at(x):.1f} y={HEIGHT - 6} text-anchor={anchor}>{html.escape(label)}</text>"
        )
    if not zero:
        parts.append(f"<path class='now' d='M{at(first):.1f} {TOP}V{HEIGHT - BOTTOM}' />")
    for name, x_values, y_values in lines:
        points = "L".join(
            f"{at(a):.1f} {height(b):.1f}"
            for a, b in zip(x_values, y_values, strict=True)
            if np.isfinite(b)
        )
        parts.append(f"<path class={name} d='M{points}' />")
    parts += [
        f"<rect class=hit x={at(first + i - 0.5):.1f} y={TOP} width={across:.2f} "
        f"height={HEIGHT - TOP - BOTTOM}><title>{html.escape(hit)}</title></rect>"
        for i, hit in enumerate(hits)
    ]
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img>{''.join(parts)}</svg>"


def _range(values: NDArray[np.float64], *, zero: bool) -> tuple[float, float]:
    """Return what an axis shows: all finite values, and zero if asked; never nothing."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (0.0 if zero else float(finite.min())), float(finite.max())
    least = max(1e-9 * max(abs(low), abs(high)), 1e-300)
    return low, high if high - low > least else low + max(1.0, abs(low) * 1e-3)


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers between ``low`` and ``high``."""
    raw = (high - low) / 4
    unit = 10.0 ** np.floor(np.log10(raw))
    step = next((unit * k for k in (1, 2, 5) if unit * k >= raw), unit * 10)
    first, last = int(np.ceil(low / step)), int(np.floor(high / step))
    return [float(n * step) for n in range(first, last + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """Write each tick with four digits, or as many as tell it from the next."""
    apart = min((b - a for a, b in pairwise(ticks)), default=0.0)
    largest = max(map(abs, ticks), default=0.0)
    digits = int(np.log10(largest / apart)) + 2 if apart > 0 and largest > 0 else 4
    return [f"{tick:.{max(digits, 4)}g}" for tick in ticks]


def _time(value: Any) -> str:  # noqa: ANN401
    text = str(value)
    return text.removesuffix(":00").replace("T", " ").removesuffix(" 00:00")


def _key(colours: Mapping[str, str]) -> str:
    """Return the legend: name -> colour."""
    spans = "".join(
        f"<span><i style='background:var(--{colour})'></i>{html.escape(name)}</span>"
        for name, colour in colours.items()
    )
    return f"<p class=key>{spans}</p>"


def _table(errors: Mapping[str, Errors]) -> str:
    heads = "".join(
        f"<th>{html.escape(name)}<br>{kind}</th>" for name in errors for kind in ("MSE", "MAE")
    )
    steps = len(next(iter(errors.values())).mse_by_step)
    rows = "".join(
        f"<tr><td>{i + 1}</td>"
        + "".join(
            f"<td>{one.mse_by_step[i]:.4f}</td><td>{one.mae_by_step[i]:.4f}</td>"
            for one in errors.values()
        )
        + "</tr>"
        for i in range(steps)
    )
    return f"<div class=wide><table><tr><th>ahead</th>{heads}</tr>{rows}</table></div>"
