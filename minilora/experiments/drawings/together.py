"""Several adapters or several devices: rows with adapters of their own, adapters added up, a base on each device."""

from matplotlib.patches import Rectangle

from minilora.experiments.drawings.shapes import NAME, QUIET, SMALL, TEXT, arrow, box, canvas, key, label, node
from minilora.experiments.pictures import Figure, redrawable


@redrawable
def adapters_by_row() -> Figure:
    """A batch whose rows have different adapters: one product with W for all, two small ones for each row."""
    figure, axes = canvas(
        7.2,
        4.1,
        "A batch of three rows. Above, all three go together through the one frozen W. Below, each goes through the A "
        "and then the B of its own adapter: row 1 and row 3 through those of adapter 1, row 2 through those of adapter "
        "2. The two results are added row by row.",
    )
    roles = ["trained", "second", "trained"]
    middle, high, apart = 2.3, 0.28, 0.34
    rows = [middle + apart, middle, middle - apart]
    for x, name in ((0.85, "x"), (6.45, "y")):
        for number, y in enumerate(rows, 1):
            box(axes, (x, y), (0.9, high), "plain", f"${name}_{number}$", TEXT + 1)
    label(axes, 0.85, 2.98, "batch", TEXT)
    split = 1.6
    arrow(axes, (1.3, middle), (split, middle), head=False)
    arrow(axes, (split, middle), (split, 3.3), (2.5, 3.3))
    box(axes, (3.55, 3.3), (2.1, 0.9), "frozen", "$W$")
    label(axes, 3.55, 3.92, "one product for all rows", TEXT)
    arrow(axes, (4.6, 3.3), (5.3, 3.3), (5.3, middle + 0.17))
    bank = [1.6, 1.22, 0.84]
    arrow(axes, (split, middle), (split, bank[-1]), head=False)
    for number, (y, role) in enumerate(zip(bank, roles, strict=True), 1):
        which = 1 if role == "trained" else 2
        arrow(axes, (split, y), (2.5, y))
        label(axes, 2.05, y + 0.11, f"$x_{number}$", SMALL)
        box(axes, (2.5 + 0.475, y), (0.95, 0.28), role, f"$A_{which}$", TEXT + 1)
        arrow(axes, (3.45, y), (3.65, y))
        box(axes, (3.65 + 0.475, y), (0.95, 0.28), role, f"$B_{which}$", TEXT + 1)
        arrow(axes, (4.6, y), (5.3, y), head=False)
    arrow(axes, (5.3, bank[-1]), (5.3, middle - 0.17))
    label(axes, 3.55, 0.5, "two batched products, each row with its own matrices", TEXT)
    node(axes, (5.3, middle), "+")
    arrow(axes, (5.47, middle), (6.0, middle))
    key(axes, 0.4, 0.16, {"frozen": "base", "trained": "adapter 1", "second": "adapter 2"})
    return figure


@redrawable
def adapters_added() -> Figure:
    """Two adapters made one: the sum of their products, the same as one product of rank 2r, cut to rank r."""
    figure, axes = canvas(
        7.4,
        2.9,
        "B1 A1 plus B2 A2 equals one product: B1 and B2 side by side, times A1 above A2, of rank 2r. Cut to rank r by "
        "its singular values it is nearly the same: one tall B and one wide A.",
    )
    tall, thin, middle = 1.0, 0.24, 1.55
    top = middle + tall / 2

    def tower(x: float, role: str, name: str):
        box(axes, (x + thin / 2, middle), (thin, tall), role, name, TEXT + 1)

    def slab(x: float, place: int, role: str, name: str):
        box(axes, (x + tall / 2, top - thin * (place + 0.5)), (tall, thin), role, name, TEXT + 1)

    tower(0.3, "trained", "$B_1$")
    slab(0.6, 0, "trained", "$A_1$")
    label(axes, 1.78, middle, "+", NAME)
    tower(1.96, "second", "$B_2$")
    slab(2.26, 0, "second", "$A_2$")
    label(axes, 3.46, middle, "=", NAME)
    tower(3.66, "trained", "$B_1$")
    tower(3.66 + thin, "second", "$B_2$")
    slab(4.2, 0, "trained", "$A_1$")
    slab(4.2, 1, "second", "$A_2$")
    label(axes, 5.4, middle, "≈", NAME)
    tower(5.6, "plain", "$B$")
    slab(5.9, 0, "plain", "$A$")
    for x, title, remark in (
        (1.78, "sum", "two products of rank $r$"),
        (4.43, "concatenation", "rank $2r$, the same matrix"),
        (6.25, "truncation", "rank $r$, nearly"),
    ):
        label(axes, x, 2.5, title, TEXT + 1, weight="bold")
        label(axes, x, 0.8, remark, SMALL, color=QUIET)
    key(axes, 0.3, 0.22, {"trained": "adapter 1", "second": "adapter 2"})
    return figure


@redrawable
def data_parallel() -> Figure:
    """Two devices with the frozen base on each: only the gradients of A and B go over the wire."""
    figure, axes = canvas(
        7,
        3.7,
        "Two devices side by side. On each: its half of the batch, the whole frozen base, A and B, and their "
        "gradients. Between them one arrow with two heads, at the gradients of A and B alone: they are added up. Then "
        "both devices take the same step.",
    )
    for x, number in ((1.5, 1), (5.5, 2)):
        axes.add_patch(Rectangle((x - 1.25, 0.55), 2.5, 2.95, facecolor="none", edgecolor=QUIET, linewidth=1.2))
        label(axes, x - 1.12, 3.3, f"device {number}", TEXT + 1, ha="left", weight="bold")
        box(axes, (x, 2.83), (1.7, 0.3), "plain", "half of the batch", TEXT)
        arrow(axes, (x, 2.68), (x, 2.48))
        box(axes, (x - 0.3, 2.03), (1.1, 0.9), "frozen", "$W$")
        box(axes, (x + 0.55, 2.03), (0.6, 0.9), "trained", "$A, B$", TEXT + 1)
        arrow(axes, (x + 0.55, 1.58), (x + 0.55, 1.22))
        label(axes, x + 0.4, 1.4, "backward", SMALL, ha="right", color=QUIET)
        box(axes, (x + 0.15, 1.0), (1.4, 0.44), "plain", "gradients\nof $A$ and $B$", SMALL)
    left, right = 1.5 + 0.85, 5.5 - 0.55
    arrow(axes, (3.6, 1.0), (left, 1.0))
    arrow(axes, (3.6, 1.0), (right, 1.0))
    label(axes, 3.5, 1.55, "their sum:", TEXT)
    label(axes, 3.5, 1.25, "$r$ · (in + out)", SMALL)
    label(axes, 3.5, 0.8, "all that is sent", SMALL, color=QUIET)
    key(axes, 0.25, 0.2, {"frozen": "frozen, the same on both", "trained": "trained, takes the same step on both"})
    return figure
