"""`frontier.png`: every trial's accuracy against its speed, with error bars on both axes.

Engines differ by colour *and* marker (Okabe and Ito's palette, safe for colour-blind readers, legible in grey).
The band below the reference is the margin of non-inferiority: what lies inside may still answer right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.artifacts import Json, replacing
from hasten.reporting.frontier import Point, frontier, points
from hasten.reporting.units import quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NOTE = "Bars: 95% intervals of each trial by itself. Differences are paired, item by item, and surer than the bars."
INK, FAINT = "#222222", "#8A8A8A"
STYLE = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "font.size": 10.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(measurements: Sequence[Json], verdict: Json, path: Path, *, titles: Mapping[str, str] | None = None) -> None:
    """Write the picture, one panel per scenario from top to bottom, atomically. The same inputs give the same bytes."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scenarios = verdict["scenarios"]
    engines = sorted({measurement["engine"] for measurement in measurements})
    looks = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(engines)}
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(9.0, 0.6 + 5.6 * max(len(scenarios), 1)), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(heading(verdict), fontsize=12.5, fontweight="bold")
        figure.supxlabel(NOTE, fontsize=8.5, color="#555555")
        for index, (name, entry) in enumerate(scenarios.items(), start=1):
            axes = figure.add_subplot(len(scenarios), 1, index)
            axes.set_title((titles or {}).get(name, name), fontsize=11, pad=10)
            panel(axes, points(measurements, name, entry), entry, verdict["margin_points"], looks)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


def heading(verdict: Json) -> str:
    """What was studied, and where: the picture must not be read without it."""
    machine = verdict["machine"] or {}
    device = ", ".join(machine.get("gpu") or []) or machine.get("cpu") or "an unknown machine"
    threads = f", {machine['threads']} threads" if machine.get("threads") else ""
    return f"Plan “{verdict['plan']}” on {device}{threads}"


def panel(
    axes: Axes, candidates: Sequence[Point], entry: Json, margin_points: float, looks: Mapping[str, tuple[str, str]]
) -> None:
    """One scenario's trials. Without a reference there is nothing to relate speeds to: the panel says so."""
    reference = next((point for point in candidates if point.trial == entry["reference"]), None)
    if reference is None:
        axes.text(0.5, 0.5, entry["why"] or "no reference", ha="center", va="center", wrap=True, color=FAINT)
        axes.set_axis_off()
        return
    level = 100 * reference.accuracy.value
    axes.axhspan(level - margin_points, level, color="#009E73", alpha=0.10, linewidth=0, zorder=0)
    axes.axhline(level, color=FAINT, linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
    best = frontier(candidates)
    axes.plot(
        [point.ratio(reference.figure.value).value for point in best],
        [100 * point.accuracy.value for point in best],
        color=FAINT, linewidth=1.6, zorder=1.5,
    )  # fmt: skip
    for point in candidates:
        _mark(axes, point, reference.figure.value, looks[point.engine])
    _ring(axes, reference, reference, INK, 11.5)
    champion = next((point for point in candidates if point.trial == entry["champion"]), None)
    if champion is not None:
        _ring(axes, champion, reference, "#E69F00", 16)
    _scales(axes, candidates, reference, entry["headline"])
    _labels(axes, candidates, reference, entry, looks)
    _legend(axes, candidates, margin_points, looks)


def _mark(axes: Axes, point: Point, reference: float, look: tuple[str, str]) -> None:
    ratio, accuracy = point.ratio(reference), point.accuracy
    colour, marker = look
    axes.errorbar(
        ratio.value,
        100 * accuracy.value,
        xerr=[[ratio.value - ratio.low], [ratio.high - ratio.value]],
        yerr=[[100 * (accuracy.value - accuracy.low)], [100 * (accuracy.high - accuracy.value)]],
        color=colour, marker=marker, markersize=7.5, markeredgecolor="white", markeredgewidth=0.8,
        elinewidth=1.1, capsize=2.5, ecolor=(colour, 0.45), zorder=3,
    )  # fmt: skip


def _ring(axes: Axes, point: Point, reference: Point, colour: str, size: float) -> None:
    x, y = point.ratio(reference.figure.value).value, 100 * point.accuracy.value
    axes.plot(x, y, marker="o", markersize=size, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2.0)


def _scales(axes: Axes, candidates: Sequence[Point], reference: Point, headline: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ratios = [point.ratio(reference.figure.value) for point in candidates]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ratio.low for ratio in ratios) / 1.18, max(ratio.high for ratio in ratios) * 1.28)
    spread = axes.get_xlim()[1] / axes.get_xlim()[0]
    locator = LogLocator(base=2, subs=(1.0,) if spread > 6 else (1.0, 1.25, 1.5, 1.75))
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Speed relative to the reference (faster →)")
    axes.set_ylabel(f"Accuracy on validation, all tasks pooled (%, n = {reference.accuracy.n:,})")
    axes.tick_params(which="minor", length=0)
    axes.grid(color="#E6E6E6", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)

    # The same axis in the figure's own unit: what a user waits, or gets, in absolute terms.
    value = reference.figure.value

    shown = quantity(headline)

    def absolute(x: float) -> str:
        return shown.show(value / x if reference.lower_is_better else value * x)

    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(locator)
    top.xaxis.set_major_formatter(FuncFormatter(lambda x, _: absolute(x)))
    top.xaxis.set_minor_formatter(NullFormatter())
    top.set_xlabel(f"{shown.label}, {shown.unit}", fontsize=9.5, color="#555555")
    top.tick_params(colors="#555555", labelsize=9)
    top.tick_params(which="minor", length=0)


def _labels(
    axes: Axes, candidates: Sequence[Point], reference: Point, entry: Json, looks: Mapping[str, tuple[str, str]]
) -> None:
    from adjustText import adjust_text
    from matplotlib.patheffects import withStroke

    roles = {entry["reference"]: " (reference)"} | {entry["champion"]: " (champion)"}
    if entry["reference"] == entry["champion"]:
        roles = {entry["reference"]: " (reference, kept)"}
    shown = Counter((point.variant, point.engine) for point in candidates)
    texts = []
    for point in candidates:
        x, y = point.ratio(reference.figure.value).value, 100 * point.accuracy.value
        role = roles.get(point.trial, "")
        weight = "bold" if role else "normal"
        # A variant twice on one engine (with other options) is told apart by its trial's name.
        name = point.variant if shown[point.variant, point.engine] == 1 else point.trial
        text = axes.text(x, y, name + role, fontsize=9.5, color=looks[point.engine][0], fontweight=weight)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        texts.append(text)
    if (figure := axes.get_figure(root=True)) is not None:
        figure.draw_without_rendering()  # adjustText needs the final scales
    arrows = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 6}
    adjust_text(
        texts, ax=axes, expand=(1.25, 1.7), force_text=(0.4, 0.6), arrowprops=arrows, iter_lim=400, time_lim=None
    )


def _legend(
    axes: Axes, candidates: Sequence[Point], margin_points: float, looks: Mapping[str, tuple[str, str]]
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    engines = sorted({point.engine for point in candidates})
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=looks[name][0], marker=looks[name][1], linestyle="", markersize=7.5, label=name)
        for name in engines
    ]
    handles.append(Line2D([], [], color=FAINT, linewidth=1.6, label="frontier"))
    handles.append(Patch(color="#009E73", alpha=0.15, label=f"margin: {margin_points:g} points"))
    # Below the axes: inside, it would hide somebody's error bar.
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(handles), frameon=False, fontsize=9.5
    )
