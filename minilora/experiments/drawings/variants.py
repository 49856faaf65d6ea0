"""Two variants of LoRA: DoRA, which trains length and direction apart, and PiSSA, which trains what is largest in W."""

import math

from matplotlib.patches import Arc

from minilora.experiments.drawings.shapes import (
    INK,
    NAME,
    QUIET,
    ROLES,
    SMALL,
    TEXT,
    arrow,
    box,
    canvas,
    key,
    label,
    matrix,
)
from minilora.experiments.pictures import Figure, redrawable


@redrawable
def length_and_direction() -> Figure:
    """DoRA: a row of W as an arrow, turned by LoRA's change, and then given the trained length m."""
    figure, axes = canvas(
        7,
        3.2,
        "Two panels. On the left LoRA: the arrow w, a row of W, and the arrow of the change s B A end to end; their "
        "sum v has another direction and another length. On the right DoRA: of v only the direction is kept, a dashed "
        "line, and along it lies an arrow of length m, which is trained on its own. An arc marks the length of w, "
        "which m starts from.",
    )
    w, change, m = (1.75, 0.15), (0.1, 1.35), 1.4
    v = (w[0] + change[0], w[1] + change[1])
    titles = {"LoRA": "$v = w + s \\cdot BA$", "DoRA": "$m \\cdot v \\, / \\, \\Vert v \\Vert$"}
    for left, (title, formula) in zip((0.45, 4.0), titles.items(), strict=True):
        base = 0.75
        tip, end = (left + w[0], base + w[1]), (left + v[0], base + v[1])
        label(axes, left, 2.9, title, NAME, ha="left", weight="bold")
        label(axes, left + 0.75, 2.9, formula, NAME, ha="left")
        arrow(axes, (left, base), tip, color=ROLES["frozen"].edge, linewidth=2.8)
        label(axes, left + 0.9, base - 0.1, "$w$, a row of $W$", TEXT)
        arrow(axes, tip, end, color=ROLES["trained"].face, linewidth=2.8)
        label(axes, tip[0] + 0.15, base + 0.75, "$s \\cdot BA$", TEXT, ha="left")
        if title == "LoRA":
            arrow(axes, (left, base), end, color=INK, linewidth=1.8)
            label(axes, end[0] + 0.1, end[1] + 0.08, "$v$", NAME, ha="left")
            continue
        label(axes, end[0] + 0.1, end[1] + 0.08, "$v$", NAME, ha="left")
        share = m / math.hypot(*v)
        long = (left + share * v[0], base + share * v[1])
        arrow(axes, long, end, head=False, color=INK, linewidth=1.3, linestyle=(0, (4, 3)))
        arrow(axes, (left, base), long, color=ROLES["trained"].face, linewidth=2.8)
        label(axes, left + 0.8, base + 0.36, "length $m$", TEXT, ha="left")
        size = 2 * math.hypot(*w)
        axes.add_patch(Arc((left, base), size, size, theta1=5, theta2=72, color=QUIET, linestyle=":", linewidth=1.5))
        label(axes, left + 0.5, base + 1.8, "$m$ starts at $\\Vert w \\Vert$", SMALL, color=QUIET)
    key(axes, 0.45, 0.2, {"frozen": "frozen", "trained": "trained: $A$, $B$ and, in DoRA, $m$"})
    return figure


@redrawable
def pissa_split() -> Figure:
    """PiSSA: the r largest singular values of W become B and A; the rest of W is the frozen matrix."""
    figure, axes = canvas(
        7.5,
        2.85,
        "The singular values of W, sorted, as bars that fall. The first r of them are cut off: with their directions "
        "they become B times A, which is trained. All others, with theirs, make the residual, the frozen matrix that "
        "the layer keeps. Below: W equals the residual plus s B A.",
    )
    count, r, step, low = 18, 4, 0.1, 0.8
    for number in range(count):
        height = 1.4 * math.exp(-number / 5) + 0.12
        place = 0.4 + step * (number + 0.5 + 2.5 * (number >= r))
        box(axes, (place, low + height / 2), (step, height), "trained" if number < r else "frozen")
    label(axes, 0.4, 2.6, "singular values of $W$", ha="left")
    label(axes, 0.4 + step * r / 2, low - 0.17, "$r$ largest", SMALL, color=QUIET)
    label(axes, 0.4 + step * (r + 2.5 + (count - r) / 2), low - 0.17, "all others", SMALL, color=QUIET)

    side, thin, middle = 0.95, 0.24, low + 0.475
    matrix(axes, (3.48, middle), (side, side), "plain", "$W$", "out", "in")
    label(axes, 4.14, middle, "=", NAME)
    label(axes, 4.4, middle, "$s$ ·", NAME)
    box(axes, (4.69, middle), (thin, side), "trained", "$B$")
    box(axes, (5.38, middle + side / 2 - thin / 2), (side, thin), "trained", "$A$")
    label(axes, 6.03, middle, "+", NAME)
    box(axes, (6.68, middle), (side, side), "frozen", "rest")
    key(axes, 0.4, 0.2, {"trained": "trained", "frozen": "frozen"})
    return figure
