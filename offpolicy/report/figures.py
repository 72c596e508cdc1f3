"""Figures of a report: one drawing as SVG for the page and as PNG and PDF for papers, alike on every build."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.files import atomic_write
from offpolicy.report.curves import Line, MeanCurve
from offpolicy.report.tables import Estimate

# Okabe and Ito's colours, which differ for every kind of colour vision, without black and yellow, which vanish on dark
# and on light; from the third method on dashes and markers differ as well
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
DASHES = ("-", "-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_METHODS, MOST_PANELS = 8, 6  # of one panel, of one figure
WIDTH = 6.8  # inches: two columns of a paper
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "pdf.fonttype": 42,  # publishers refuse type 3
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Look:
    """How one method looks, in all figures alike."""

    colour: str
    dash: Any
    marker: str


@dataclass(frozen=True)
class Drawn:
    """A figure as the page shows it.

    Attributes:
        name: of its files, without ending.
        svg: for the page, in the colour of its text.
        words: what it shows, in one sentence.
        files: whether it lies beside the page as PNG and PDF.
    """

    name: str
    svg: str
    words: str
    files: bool = True


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """A look for every method, by the order given."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(dict.fromkeys(methods))
    }


def label(text: str, most: int = 60) -> str:
    """A name as matplotlib writes it: no mathematics, nothing that a font cannot show, not too long."""
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.encode(errors="replace").decode().replace("$", r"\$")


@contextmanager
def canvas(rows: int, columns: int, height: float) -> Iterator[tuple[Any, list[Any]]]:
    """A figure of ``rows`` by ``columns`` panels, ``height`` inches each, in the style of the report."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyplot would keep global state
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * rows + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def keep_figure(figure: Any, name: str, words: str, folder: Path | None) -> Drawn:
    """Write a figure as PNG and PDF where there is a folder, and give it as SVG; two builds are equal byte by byte."""
    import matplotlib as mpl

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # found once, for all files
    if folder is not None:
        for kind, more in (("png", {"dpi": 160, "metadata": {"Software": None}}), ("pdf", {"metadata": NO_DATE})):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, **more)
            atomic_write(folder / f"{name}.{kind}", picture.getvalue())
    drawing = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Drawn(name, page_svg(drawing.getvalue(), words), words, folder is not None)


NO_DATE = {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None}


def page_svg(svg: str, words: str) -> str:
    """An SVG inside of a page: no header and no sizes, the page's colour for text and axes, a name for who listens."""
    from xml.sax.saxutils import quoteattr

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # of groups, which nothing refers to; alike in every figure
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("#000000", "currentColor")  # text without a colour has that of the page by its style
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(words)}', 1).strip()


# -- the figures -------------------------------------------------------------------------------------------------------


def draw_curve(axes: Any, curve: MeanCurve, look: Look, name: str) -> None:
    """Mean and band of a method, its seeds faint; of fewer than three seeds their points. Dotted: the switch."""
    if curve.switch is not None:
        axes.axvline(curve.switch, color=look.colour, ls=":", lw=1)
    if curve.low is None:
        for i, line in enumerate(curve.lines or (Line(curve.x, curve.y),)):
            shown = label(name) if not i else None
            axes.plot(line.x, line.y, color=look.colour, marker=look.marker, ms=3, lw=0.6, alpha=0.8, label=shown)
        return
    for line in curve.lines:
        axes.plot(line.x, line.y, color=look.colour, lw=0.5, alpha=0.25)
    axes.fill_between(curve.x, curve.low, curve.high, color=look.colour, alpha=0.18, lw=0)
    every = max(1, len(curve.x) // 8)
    axes.plot(
        curve.x, curve.y, color=look.colour, ls=look.dash, marker=look.marker, ms=3, markevery=every, label=label(name)
    )


def draw_panels(
    name: str,
    panels: Sequence[tuple[str, Mapping[str, MeanCurve]]],
    looks: Mapping[str, Look],
    axis: str,
    height: str,
    folder: Path,
) -> list[Drawn]:
    """Curves, a panel per title; at most six panels to a figure and eight methods to a panel.

    Args:
        name: of the files.
        panels: titles, each with the curve of every method.
        looks: of all methods.
        axis: what runs along x.
        height: what runs along y.
        folder: of the files.
    """
    methods = [name for name in looks if any(name in curves for _, curves in panels)]
    drawn: list[Drawn] = []
    for chosen in pieces(methods, MOST_METHODS):
        found = [(title, {m: curves[m] for m in chosen if m in curves}) for title, curves in panels]
        for some in pieces([one for one in found if one[1]], MOST_PANELS):
            columns = min(3, len(some))
            with canvas(-(-len(some) // columns), columns, 2.3) as (figure, places):
                for place, (title, curves) in zip(places, some):
                    for method, curve in curves.items():
                        draw_curve(place, curve, looks[method], method)
                    place.set(title=label(title), xlabel=axis, ylabel=height)
                    place.grid(alpha=0.25)
                for place in places[len(some) :]:
                    place.set_axis_off()
                _legend(figure, places)
                words = f"{height} by {axis} for {listed_methods(chosen)}: {', '.join(title for title, _ in some)}."
                drawn.append(keep_figure(figure, f"{name}-{len(drawn) + 1}", words, folder))
    return drawn


def _legend(figure: Any, places: Iterable[Any]) -> None:
    found = {text: handle for place in places for handle, text in zip(*place.get_legend_handles_labels())}
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)), frameon=False)


def draw_aggregates(
    name: str, aggregates: Mapping[str, Sequence[Estimate | None]], looks: Mapping[str, Look], folder: Path
) -> Drawn:
    """Aggregates with their intervals, a panel each and a line per method."""
    methods = list(looks)
    with canvas(1, len(aggregates), 0.6 + 0.22 * len(methods)) as (figure, places):
        for place, (title, estimates) in zip(places, aggregates.items()):
            for i, (method, one) in enumerate(zip(methods, estimates)):
                if one is not None:
                    look = looks[method]
                    if one.low is not None:
                        place.plot([one.low, one.high], [i, i], color=look.colour, lw=4, alpha=0.4)
                    place.plot([one.value], [i], color=look.colour, marker=look.marker, ms=5)
            first = place is places[0]
            place.set(title=title, ylim=(len(methods) - 0.5, -0.5), yticks=range(len(methods)))
            place.set_yticklabels([label(method, 24) for method in methods] if first else [])
            place.grid(axis="x", alpha=0.25)
        words = f"{', '.join(aggregates)} over all tasks with 95 % intervals for {listed_methods(methods)}."
        return keep_figure(figure, name, words, folder)


def draw_profiles(
    name: str, thresholds: np.ndarray, profiles: Mapping[str, MeanCurve], looks: Mapping[str, Look], folder: Path
) -> list[Drawn]:
    """The share of runs above every score, with bands."""
    found: list[Drawn] = []
    for chosen in pieces(list(profiles), MOST_METHODS):
        with canvas(1, 1, 2.8) as (figure, places):
            for method in chosen:
                draw_curve(places[0], profiles[method], looks[method], method)
            places[0].set(xlabel="score τ", ylabel="share of runs above τ", xlim=(thresholds[0], thresholds[-1]))
            places[0].grid(alpha=0.25)
            _legend(figure, places)
            words = f"Performance profiles: the share of runs with a score above τ, for {listed_methods(chosen)}."
            found.append(keep_figure(figure, f"{name}-{len(found) + 1}", words, folder))
    return found


def draw_improvement(name: str, best: str, others: Mapping[str, Estimate], look: Look, folder: Path) -> Drawn:
    """How likely a run of the best method beats one of each other, with intervals."""
    with canvas(1, 1, 0.6 + 0.25 * len(others)) as (figure, places):
        (place,) = places
        for i, one in enumerate(others.values()):
            if one.low is not None:
                place.plot([one.low, one.high], [i, i], color=look.colour, lw=4, alpha=0.4)
            place.plot([one.value], [i], color=look.colour, marker=look.marker, ms=5)
        place.axvline(0.5, color="#8C8C8C", ls=":", lw=1)
        place.set(xlim=(0, 1), ylim=(len(others) - 0.5, -0.5), yticks=range(len(others)))
        place.set_yticklabels([label(other, 40) for other in others])
        place.set_xlabel(f"P({label(best, 30)} > other)")
        return keep_figure(figure, name, f"How likely a run of {best} beats a run of each other method.", folder)


def draw_histograms(
    name: str,
    panels: Mapping[str, Mapping[str, np.ndarray]],
    looks: Mapping[str, Look],
    across: str,
    folder: Path | None,
    *,
    counts: bool = False,
) -> Drawn:
    """Values of single rows as outlines of histograms, at most three panels side by side and a colour per name.

    Args:
        name: of the files.
        panels: titles, each with the values (n,) of every name.
        looks: of the names.
        across: what runs along x; empty where the titles say it.
        folder: of the files; None for the page alone.
        counts: how many rather than the density.
    """
    columns = min(3, len(panels))
    with canvas(-(-len(panels) // columns), columns, 2.3) as (figure, places):
        for place, (title, values) in zip(places, panels.items()):
            every = np.concatenate(list(values.values())).astype(np.float64)
            edges = (
                np.linspace(every.min(), every.max(), 31) if np.ptp(every) else every[0] + np.linspace(-0.5, 0.5, 12)
            )
            for one, own in values.items():
                look, shown = looks[one], label(one) if len(looks) > 1 else None
                drawn = {"histtype": "step", "density": not counts, "color": look.colour, "ls": look.dash}
                place.hist(np.asarray(own, np.float64), edges, label=shown, **drawn)
            place.set(title=label(title), xlabel=across, ylabel="number" if counts else "density")
            place.locator_params(axis="x", nbins=5)
        for place in places[len(panels) :]:
            place.set_axis_off()
        _legend(figure, places)
        return keep_figure(figure, name, f"Histograms of {across or ', '.join(panels)}.", folder)


def draw_occupancy(name: str, plane: np.ndarray, axes: tuple[str, str], folder: Path | None) -> Drawn:
    """Where points (n, 2) lie: how many in each cell of a grid, darker for more, empty for none."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    count, x, y = np.histogram2d(plane[:, 0], plane[:, 1], bins=24)
    ends = [(*_rgb(COLOURS[0]), 0.15), (*_rgb(COLOURS[0]), 1.0)]
    shades = LinearSegmentedColormap.from_list("shades", ends, N=16)  # few enough to stay drawing, not picture
    with canvas(1, 1, 3.2) as (figure, places):
        shown = np.ma.masked_equal(count.T, 0)
        mesh = places[0].pcolor(x, y, shown, cmap=shades, norm=LogNorm(1, max(2.0, count.max())), lw=0)
        figure.colorbar(mesh, ax=places[0], label="states in a cell")
        places[0].set(xlabel=axes[0], ylabel=axes[1])
        filled = int((count > 0).sum())
        words = f"Where the states lie: {filled} of {count.size} cells hold some, by {axes[0]} and {axes[1]}."
        return keep_figure(figure, name, words, folder)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def pieces(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    """Items in groups of at most so many."""
    for start in range(0, len(items), most):
        yield items[start : start + most]


def listed_methods(methods: Sequence[str]) -> str:
    """Methods as a sentence names them."""
    return ", ".join(methods[:8]) + (f" and {len(methods) - 8} more" if len(methods) > 8 else "")
