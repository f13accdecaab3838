"""A run's charts: as SVG that stands inside its page, and as PNG files for its model card.

matplotlib writes fixed colours and the same ids into every SVG. Here colours become CSS variables, so that one picture
serves light and dark, and ids are made the chart's own. The Hub shows pictures on white; their bytes follow from the
run's figures alone, without matplotlib's version and with its own font.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.run_folder import RunFolder

__all__ = ["bars", "curves", "heat_map", "run_pictures", "thin_out"]

_COLOURS = {"ink": "#010203", "faint": "#040506", "adapted": "#070809", "base": "#0a0b0c"}
"""Colours that no chart would use, by the CSS variable that takes their place."""
_STYLE: dict[str, Any] = {
    "axes.edgecolor": _COLOURS["faint"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "onecard",
    "text.color": _COLOURS["ink"],
    "text.parse_math": False,
    "xtick.color": _COLOURS["ink"],
    "ytick.color": _COLOURS["ink"],
}
_MOST_POINTS = 400
_SIZE = (4.2, 2.5)

Points = Sequence[tuple[float, float]]

_PNG_STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,
}
_PNG_COLOURS = {"training": "#1f6feb", "held-out": "#d1571b"}


def thin_out(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: the means of equally many neighbours each, last one included."""
    group = -(-len(points) // most) or 1
    chunks = [points[start : start + group] for start in range(0, len(points), group)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def curves(
    name: str, lines: Mapping[str, Points], x: str, y: str, levels: Mapping[str, float] = {}, *, from_zero: bool = True
) -> str:
    """Lines over a common axis, the first in the adapted model's colour; `levels` are horizontal."""
    with _drawing():
        axes = _axes()
        colours = [_COLOURS["adapted"], _COLOURS["base"], _COLOURS["ink"]]
        for index, (label, points) in enumerate(lines.items()):
            xs, ys = zip(*thin_out(points), strict=True)
            axes.plot(xs, ys, color=colours[index % 3], label=label, marker="o" if len(xs) < 20 else "", markersize=3)
        for label, level in levels.items():
            axes.axhline(level, color=_COLOURS["base" if label == "base" else "adapted"], linestyle="--", label=label)
        axes.set(xlabel=x, ylabel=y)
        if from_zero:
            axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-12))
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        if len(lines) + len(levels) > 1:
            axes.legend(fontsize=8)
        return _svg(name, axes)


def bars(name: str, sizes: Mapping[str, float], x: str) -> str:
    """Horizontal bars, first on top, with their values."""
    with _drawing():
        axes = _axes((4.2, 0.8 + 0.28 * len(sizes)))
        drawn = axes.barh(list(sizes), list(sizes.values()), color=_COLOURS["adapted"], height=0.7)
        axes.bar_label(drawn, fmt="{:,.4g}", padding=3)
        axes.set(xlabel=x, xlim=(0, 1.2 * max(sizes.values()) or 1))
        axes.invert_yaxis()
        return _svg(name, axes)


def heat_map(name: str, rows: Sequence[Sequence[float]], legend: str, top: float | None = None) -> str:
    """Layers by experts; rows may differ in length, and what one lacks stays empty. `top` is the scale's end."""
    width = max(map(len, rows))
    table = [[*row, *[float("nan")] * (width - len(row))] for row in rows]
    with _drawing():
        axes = _axes((4.2, min(4.6, 1.5 + 0.12 * len(rows))))
        image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=top)
        axes.set(xlabel="expert", ylabel="MoE layer")
        for axis, count in ((axes.xaxis, width), (axes.yaxis, len(rows))):
            axis.set_ticks(range(0, count, -(-count // 8)))
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label(legend)
        bar.outline.set_edgecolor(_COLOURS["faint"])
        return _svg(name, axes)


def _drawing() -> AbstractContextManager[Any]:
    return mpl.rc_context(cast(Any, _STYLE))


def _axes(size: tuple[float, float] = _SIZE) -> Axes:
    return Figure(figsize=size, layout="constrained", dpi=150).subplots()


def _svg(name: str, axes: Axes) -> str:
    """The finished drawing."""
    target = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    axes.get_figure(root=True).savefig(target, format="svg", metadata=metadata)  # type: ignore[union-attr]
    return _for_a_page(name, target.getvalue())


def _for_a_page(name: str, svg: str) -> str:
    """The `svg` element alone, its colours variables, its ids the chart's own, hidden from screen readers."""
    svg = svg[svg.index("<svg") :]
    for variable, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: ([\d.]+px) [^;"]*', r"font: \1 system-ui, sans-serif", svg)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false" '
                  r'xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1)  # fmt: skip


def run_pictures(folder: str | Path) -> dict[str, bytes]:
    """PNG bytes by file name: `loss.png` and `experts.png`, each where the run has logged what it shows."""
    run = RunFolder(Path(folder))
    metrics, experts = run.read_metrics(), run.path / "experts.json"
    layers = json.loads(experts.read_bytes()).get("layers") if experts.is_file() else []
    with mpl.rc_context(cast(Any, _PNG_STYLE)):
        drawn = {"loss.png": _loss_picture(metrics), "experts.png": _load_picture(layers or [])}
    return {name: picture for name, picture in drawn.items() if picture}


def _loss_picture(metrics: Sequence[Mapping[str, Any]]) -> bytes | None:
    figure = Figure(figsize=(6, 3.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    for label, key in (("training", "loss"), ("held-out", "eval_loss")):
        points = [(float(entry["step"]), float(entry[key])) for entry in metrics if key in entry]
        if points:
            steps, values = zip(*thin_out(points), strict=True)
            marker = "o" if len(steps) < 20 else ""
            axes.plot(steps, values, color=_PNG_COLOURS[label], label=label, marker=marker, markersize=3)
    if not axes.lines:
        return None
    learnt_from = {"rewards/margins": "preference loss", "reward": "loss of rewards"}
    of = next((words for name, words in learnt_from.items() if any(name in entry for entry in metrics)), None)
    axes.set(xlabel="step", ylabel=of or "loss, nats per token")
    axes.legend(fontsize=8)
    return _png(figure)


def _load_picture(layers: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Tokens of each expert over the layer's mean."""
    counts = [layer["after"] for layer in layers if sum(layer["after"])]
    if not counts:
        return None
    width = max(map(len, counts))
    rows = [[count * len(row) / sum(row) for count in row] + [float("nan")] * (width - len(row)) for row in counts]
    figure = Figure(figsize=(6, min(5.0, 1.8 + 0.12 * len(rows))), layout="constrained", dpi=120)
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    axes.set(xlabel="expert", ylabel="MoE layer")
    figure.colorbar(image, ax=axes, pad=0.02).set_label("times the even share")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()
