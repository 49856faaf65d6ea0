"""How every figure looks: one palette, one look for each method, axes without clutter, names at the ends of curves.

The colours are those of Okabe and Ito, which remain apart for colour-blind readers; where two methods share one, marker
and line tell them apart, as they do in print without colour.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.textpath import TextPath
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from minilora.experiments.pictures import Figure

BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#999999"
DARK, LIGHT = "#666666", "#DDDDDD"  # of lines that are no one's curve
HATCHES = ("", "///", "...", "xxx", "---")
SMALL = 9  # points: titles that are sentences, legends, names at the ends of curves
LEGEND: dict[str, Any] = dict(frameon=False, fontsize=SMALL)


class Look(NamedTuple):
    label: str
    colour: str
    line: str = "-"
    marker: str = "o"

    @property
    def style(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return dict(label=self.label, color=self.colour, linestyle=self.line, marker=self.marker, markersize=4)


LOOKS = {
    "full": Look("full fine-tuning", VERMILION),
    "lora": Look("LoRA", BLUE, "-", "s"),
    "qlora": Look("QLoRA", GREEN, "--", "^"),
    "loftq": Look("LoftQ", GREEN, ":", "v"),
    "dora": Look("DoRA", PINK, "-", "D"),
    "rslora": Look("rsLoRA", SKY, "-", "P"),
    "lora+": Look("LoRA+", ORANGE, "-", "X"),
    "lora-fa": Look("LoRA-FA", SKY, "--", "<"),
    "pissa": Look("PiSSA", BLACK, "-", "x"),
    "olora": Look("OLoRA", BLACK, "--", ">"),
    "eva": Look("EVA", BLACK, ":", "*"),
    "adalora": Look("AdaLoRA-style", BLUE, "--", "d"),
    "soft-prompt": Look("soft prompt", GREY, "-", "p"),
    "prefix": Look("prefix tuning", GREY, "--", "h"),
    "base": Look("base", DARK, "--", ""),
    "limit": Look("limit", BLACK, "--", ""),
}
# Of what is no method, in this order.
OTHERS = (
    Look("", BLUE),
    Look("", VERMILION, "--", "s"),
    Look("", GREEN, ":", "^"),
    Look("", BLACK, "-.", "D"),
    Look("", PINK, "-", "v"),
    Look("", ORANGE, "--", "X"),
    Look("", SKY, ":", "P"),
    Look("", GREY, "-.", "*"),
)


def look_of(name: str) -> Look:
    """A method's own look; of anything else its name, in grey."""
    return LOOKS.get(name, Look(name, DARK))


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """The methods' own looks, and for other names those of OTHERS in a colour that no method here has, as far as such
    are left."""
    names = list(names)
    taken = {LOOKS[name].colour for name in names if name in LOOKS}
    free = [look for look in OTHERS if look.colour not in taken] or list(OTHERS)
    others = [name for name in names if name not in LOOKS]
    return {name: LOOKS.get(name) or free[others.index(name) % len(free)]._replace(label=name) for name in names}


def new_figure(width: float = 5, height: float = 3, rows: int = 1, columns: int = 1):
    """A figure of so many inches and its panels, which share the x axis, and in one row also the y axis."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def rows_downward(axes, names, unit: str | None, room: float, places=None):
    """Names the rows from the top down. room: for numbers to the right of bars; places: if not 0, 1, 2 ..."""
    axes.set_yticks(places or range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=room)
    if unit is not None:
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(EngFormatter(unit))


def log_ticks(axis, low_and_high: Sequence[float]):
    """1, 2 and 5 of each decade, as far as there is room, as plain numbers; and no other names."""
    wide = max(low_and_high) / min(low_and_high)
    axis.set_major_locator(LogLocator(subs=(1,) if wide > 1000 else (1, 3) if wide > 30 else (1, 2, 5), numticks=20))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def titled(axes, title: str):
    """A title that may be a sentence."""
    axes.set_title(title, fontsize=SMALL + 1, wrap=True)


def finished(figure: Figure, axes, **settings) -> Figure:
    """The figure with its labels, and with each curve named at its end; where one ends early, in a legend below."""
    axes.set(**settings)
    axes.get_xlim(), axes.get_ylim()  # of all that is drawn by now, for the transform
    handles, labels = axes.get_legend_handles_labels()
    ends: Ends = {}
    for handle, name in zip(handles, labels, strict=True):
        points = handle.get_xydata() if hasattr(handle, "get_xydata") else []
        points = [point for point in points if point[1] == point[1]]  # not NaN
        if points and len(points[-1]):
            x, y = (handle.get_transform() - axes.transAxes).transform(points[-1])
            ends[name] = (x, y, handle.get_color())
    if len(ends) == len(labels) and all(0.9 < x < 1.01 and -0.01 < y < 1.01 for x, y, _ in ends.values()):
        name_ends(figure, axes, ends)
    elif labels:
        legend_below(figure, axes)
    return figure


def legend_below(figure: Figure, axes):
    """Under the axes, where it hides nothing; the figure grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    columns = int(figure.get_figwidth() // (0.6 + max(map(width_of, labels))))
    columns = max(1, min(columns, len(labels)))
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, **LEGEND, loc="outside lower center", ncols=columns, columnspacing=1.5)


def width_of(text: str, size: float = SMALL) -> float:
    """Of a line of text, in inches."""
    return TextPath((0, 0), text, size=size).get_extents().width / 72


Ends = dict[str, tuple[float, float, Any]]  # by name, where a curve ends, as shares of the axes, and its colour


def name_ends(figure: Figure, axes, ends: Ends):
    """Writes each curve's name to the right of the axes, joined to the curve's end by a line in its colour."""
    names = sorted(ends, key=lambda name: ends[name][1])
    least = 0.16 / (0.72 * figure.get_figheight())  # a line of text, as a share of the axes
    for name, height in zip(names, apart([ends[name][1] for name in names], least), strict=True):
        x, y, colour = ends[name]
        join = dict(arrowstyle="-", color=colour, linewidth=0.8, shrinkA=0, shrinkB=3, relpos=(0, 0.5))
        where = dict(xycoords="axes fraction", textcoords="axes fraction", annotation_clip=False)
        axes.annotate(name, (x, y), (1.06, height), **where, arrowprops=join, fontsize=SMALL, va="center")


def apart(heights: Sequence[float], least: float = 0.065) -> list[float]:
    """Rising heights from 0 to 1, moved as little as keeps them `least` apart, so that names do not overlap.

    Where they are nearer, the group is spread around its middle, and joins the next group that it then meets.
    """
    groups: list[list[float]] = []  # each group's heights, as if all its members stood at the place of its first
    for number, height in enumerate(heights):
        groups.append([height - number * least])
        while len(groups) > 1 and statistics.mean(groups[-2]) >= statistics.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    firsts = [statistics.mean(group) for group in groups for _ in group]
    places = [max(first, 0) + number * least for number, first in enumerate(firsts)]
    for here in range(len(places) - 1, -1, -1):  # none above the top
        places[here] = min(places[here], places[here + 1] - least if here + 1 < len(places) else 1.0)
    return places
