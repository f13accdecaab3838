"""A run's pictures for its model card: PNG files whose bytes follow from the run's figures alone.

The page's charts are SVG in colours that the page decides; the Hub shows pictures on white. matplotlib writes its own
version into every file and takes fonts from the machine: the first is left out, and its own font is used.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure

from toolkit.report.charts import thin_out
from toolkit.report.page import read_metrics
from toolkit.run_folder import RunFolder

__all__ = ["run_pictures"]

_STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,
}
_COLOURS = {"training": "#1f6feb", "held-out": "#d1571b"}


def run_pictures(folder: str | Path) -> dict[str, bytes]:
    """PNG bytes by file name: `loss.png` and `experts.png`, each where the run has logged what it shows."""
    run = RunFolder(Path(folder))
    metrics, experts = read_metrics(run.metrics), run.path / "experts.json"
    layers = json.loads(experts.read_bytes()).get("layers") if experts.is_file() else []
    with mpl.rc_context(cast(Any, _STYLE)):
        drawn = {"loss.png": _loss(metrics), "experts.png": _load(layers or [])}
    return {name: picture for name, picture in drawn.items() if picture}


def _loss(metrics: Sequence[Mapping[str, Any]]) -> bytes | None:
    figure = Figure(figsize=(6, 3.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    for label, key in (("training", "loss"), ("held-out", "eval_loss")):
        points = [(float(entry["step"]), float(entry[key])) for entry in metrics if key in entry]
        if points:
            steps, values = zip(*thin_out(points), strict=True)
            marker = "o" if len(steps) < 20 else ""
            axes.plot(steps, values, color=_COLOURS[label], label=label, marker=marker, markersize=3)
    if not axes.lines:
        return None
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend(fontsize=8)
    return _png(figure)


def _load(layers: Sequence[Mapping[str, Any]]) -> bytes | None:
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
