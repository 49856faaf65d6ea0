"""The LoRA layer, and the places in a transformer block where it stands."""

from minilora.experiments.drawings.shapes import NAME, QUIET, SMALL, TEXT, arrow, box, canvas, key, label, matrix, node
from minilora.experiments.pictures import Figure, redrawable


@redrawable
def low_rank_update() -> Figure:
    """The frozen matrix W beside the trained product of B and A, from x at the bottom to y at the top."""
    figure, axes = canvas(
        6.8,
        3.9,
        "The input x goes up two ways. On the left through W, a frozen matrix of out by in numbers. On the right "
        "through A, thin and wide, r by in, and then B, tall and thin, out by r, both trained; their result is "
        "multiplied by s, which is alpha over r. The sum of both is y.",
    )
    left, right, side, r = 1.35, 3.6, 1.4, 0.26
    fork, join = 0.66, 3.16
    node(axes, (left, 0.27), "$x$")
    arrow(axes, (left, 0.44), (left, 1.14))
    arrow(axes, (left, fork), (right, fork), (right, 0.94))
    matrix(axes, (left, 1.84), (side, side), "frozen", "$W$", "out", "in", aside=0.35)
    matrix(axes, (right, 0.94 + r / 2), (side, r), "trained", "$A$", "$r$", "in", aside=0.35)
    arrow(axes, (right, 0.94 + r), (right, 1.5))
    matrix(axes, (right, 1.5 + side / 2), (r, side), "trained", "$B$", "out", "$r$", aside=0.2)
    node(axes, (left, join), "+")
    arrow(axes, (left, 1.84 + side / 2), (left, join - 0.17))
    arrow(axes, (right, 1.5 + side), (right, join), (left + 0.17, join))
    label(axes, (left + right) / 2, join + 0.15, "times  $s = \\alpha / r$", SMALL, color=QUIET)
    arrow(axes, (left, join + 0.17), (left, 3.46))
    node(axes, (left, 3.63), "$y$")

    text = 4.6
    label(axes, text, join, "$y = Wx + s \\cdot B(Ax)$", NAME, ha="left")
    box(axes, (text + 0.11, 2.5), (0.22, 0.16), "frozen")
    label(axes, text + 0.32, 2.5, "frozen", ha="left")
    label(axes, text + 0.32, 2.27, "out · in  numbers", SMALL, ha="left", color=QUIET)
    box(axes, (text + 0.11, 1.85), (0.22, 0.16), "trained")
    label(axes, text + 0.32, 1.85, "trained", ha="left")
    label(axes, text + 0.32, 1.62, "$r$ · (in + out)  numbers", SMALL, ha="left", color=QUIET)
    label(axes, text + 0.32, 1.13, "$B$ starts at zero,\nso training starts at $Wx$", SMALL, ha="left", color=QUIET)
    return figure


@redrawable
def lora_in_a_block() -> Figure:
    """A transformer block twice: with adapters on q_proj and v_proj, and with one on each linear layer."""
    figure, axes = canvas(
        7.2,
        4.6,
        "A transformer block from left to right: norm; the layers q, k and v; attention; o; a sum with what came in; "
        "norm; gate and up; their product; down; a sum again. Drawn twice: above, q_proj and v_proj have an adapter "
        "beside the frozen layer, below, all seven linear layers have one.",
    )
    for middle, title, adapted in (
        (3.2, 'target_modules = ["q_proj", "v_proj"]', "q v"),
        (1.1, 'target_modules = "all-linear"', "q k v o gate up down"),
    ):
        label(axes, 0.12, middle + 1.13, title, ha="left", family="monospace")
        one_block(axes, middle, adapted.split())
    key(axes, 0.12, 0.16, {"frozen": "frozen layer", "trained": "adapter, $A$ and $B$: trained"})
    return figure


def one_block(axes, y: float, adapted: list[str]):
    """The block along the horizontal line at y."""
    wide, high, apart = 0.56, 0.3, 0.44

    def layers(x: float, come: float, go: float, *names: str):
        """Linear layers one above the other at x, an arrow to each from x = come, and from each to x = go."""
        for number, name in enumerate(names):
            place = y + apart * ((len(names) - 1) / 2 - number)
            ends = [(come, y), (come, place)] if place != y else [(come, y)]
            arrow(axes, *ends, (x - wide / 2, place))
            end = wide / 2 + (0.13 if name in adapted else 0)
            arrow(axes, (x + end, place), (go, place))
            box(axes, (x, place), (wide, high), "frozen", name, TEXT)
            if name in adapted:
                box(axes, (x + wide / 2 + 0.065, place), (0.13, high), "trained")

    def upright(x: float, height: float, text: str, width=0.28):
        box(axes, (x, y), (width, height), "plain", text, TEXT, rotation=90)

    def add(x: float, start: float):
        """A sum at x with what was at `start`, which goes over all that is between."""
        arrow(axes, (start, y), (start, y + 0.82), (x, y + 0.82), (x, y + 0.13))
        node(axes, (x, y), "+", radius=0.13)

    arrow(axes, (0.12, y), (0.56, y))
    upright(0.7, 0.62, "norm")
    arrow(axes, (0.84, y), (1.0, y), head=False)
    layers(1.46, 1.0, 2.06, "q", "k", "v")
    upright(2.2, 1.3, "attention")
    layers(2.83, 2.34, 3.42, "o")
    add(3.55, 0.34)
    arrow(axes, (3.68, y), (4.04, y))
    upright(4.18, 0.62, "norm")
    arrow(axes, (4.32, y), (4.48, y), head=False)
    layers(4.94, 4.48, 5.5, "gate", "up")
    upright(5.64, 0.86, "SwiGLU")
    layers(6.24, 5.78, 6.76, "down")
    add(6.89, 3.86)
    arrow(axes, (7.02, y), (7.19, y))
