"""What the drawings are made of. One unit of a canvas is one inch, so that a font size means the same everywhere.

Three roles, told apart by colour, by lightness and by pattern: what is frozen is light grey, what is trained is dark
blue with white letters, what is quantized is green with dots.
"""

from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle
from matplotlib.textpath import TextPath

from minilora.experiments.pictures import Figure

INK, QUIET = "#222222", "#555555"  # letters and arrows; remarks
NAME, TEXT, SMALL = 14, 10.5, 9.5  # font sizes, in points
Point = tuple[float, float]


class Role(NamedTuple):
    face: str
    edge: str
    letters: str
    hatch: str = ""


ROLES = {
    "frozen": Role("#DEDEDE", "#767676", INK),
    "trained": Role("#0072B2", "#004C78", "white"),
    "second": Role("#E69F00", "#9A6A00", INK),  # another adapter
    "quantized": Role("#BFE3D6", "#00795A", INK, ".."),
    "plain": Role("white", "#767676", INK),
    "empty": Role("white", "#BBBBBB", QUIET),
}


def canvas(width: float, height: float, alt: str) -> tuple[Figure, Axes]:
    """An empty picture of so many inches, whose axes are measured in inches from its lower left corner."""
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.alt = alt
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def label(axes: Axes, x: float, y: float, text: str, size: float = TEXT, **style: Any):
    """Text with its centre at (x, y), or with its left edge there: ha="left"."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **style})


def box(axes: Axes, centre: Point, size: Point, role: str, text: str = "", font: float = NAME, **style: Any):
    """A rectangle of a role around its name. A role's pattern leaves the name clear: it fills the lowest part only."""
    (x, y), (width, height), look = centre, size, ROLES[role]
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(Rectangle(corner, width, height, facecolor=look.face, edgecolor=look.edge, linewidth=1.2))
    if look.hatch:
        part = min(height, 0.1) if text else height
        axes.add_patch(Rectangle(corner, width, part, hatch=look.hatch, fill=False, edgecolor=look.edge, linewidth=1.2))
    label(axes, x, y + (0.05 if look.hatch else 0), text, font, **{"color": look.letters, **style})


def matrix(
    axes: Axes, centre: Point, size: Point, role: str, name: str, rows: str = "", columns: str = "", aside: float = 0
):
    """A box for a matrix, with its number of rows at its left side and its number of columns above it.

    aside: how far to the right of the middle the columns stand, where an arrow leaves at the middle.
    """
    (x, y), (width, height) = centre, size
    box(axes, centre, size, role, name)
    label(axes, x - width / 2 - 0.07, y, rows, SMALL, ha="right", color=QUIET)
    label(axes, x + aside, y + height / 2 + 0.12, columns, SMALL, color=QUIET)


def node(axes: Axes, centre: Point, text: str, font: float = TEXT, radius: float = 0.17):
    """A circle for what flows or for an operation on it: x, y, a sum."""
    axes.add_patch(Circle(centre, radius, facecolor="white", edgecolor=INK, linewidth=1.2))
    label(axes, *centre, text, font, va="center_baseline")


def arrow(axes: Axes, *points: Point, head: bool = True, **style: Any):
    """A line through the points, straight from each to the next, with a head at the last."""
    look = {"color": INK, "linewidth": 1.3, **style}
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), solid_joinstyle="miter", solid_capstyle="butt", **look)
    if head:
        shape = FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0)
        shape.set(joinstyle="miter", capstyle="butt", **look)
        axes.add_patch(shape)
    else:
        axes.plot(*zip(*points[-2:], strict=True), solid_capstyle="butt", **look)


def key(axes: Axes, x: float, y: float, names: dict[str, str]):
    """The legend: what each role means, in one row that begins at (x, y)."""
    for role, name in names.items():
        box(axes, (x + 0.11, y), (0.22, 0.16), role)
        label(axes, x + 0.3, y, name, SMALL, ha="left")
        x += 0.6 + TextPath((0, 0), name, size=SMALL).get_extents().width / 72  # the points of an inch
