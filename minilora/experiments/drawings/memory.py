"""A training step, what it keeps, and the 4-bit block that makes the weights small."""

from minilora.experiments.drawings.shapes import INK, QUIET, SMALL, TEXT, arrow, box, canvas, key, label
from minilora.experiments.pictures import Figure, redrawable
from minilora.levels import nf4_levels


def nearest_level(levels: list[float], value: float) -> int:
    return min(range(len(levels)), key=lambda code: abs(levels[code] - value))


@redrawable
def four_bit_block() -> Figure:
    """A block of 64 weights: their one scale, the level nearest to each weight over the scale, and the codes."""
    figure, axes = canvas(
        7,
        4.7,
        "A block of 64 weights in a row. The largest magnitude among them is the scale of the block. Each weight over "
        "the scale lies on a line from -1 to 1 with sixteen levels, unevenly spaced and dense near zero; the number of "
        "the nearest level, 0 to 15, is stored, in 4 bits. The scales of 256 blocks are in turn stored in 8 bits, with "
        "one float32 scale of their own. Together 4 + 8/64 + 32/(64 times 256) = 4.127 bits for each weight.",
    )
    weights, chosen = [0.24, -0.11, 0.08, -0.80, 0.33, -0.17, 0.56, 0.0, -0.42, 0.29], 6
    levels, scale = nf4_levels().tolist(), max(map(abs, weights))
    codes = [nearest_level(levels, weight / scale) for weight in weights]
    wide, high, left = 0.56, 0.32, 0.3
    places = [left + wide * (number + 0.5 + (number > 7)) for number in range(len(weights))]

    def row(y: float, role: str, texts: list[str], title: str):
        for place, text in zip(places, texts, strict=True):
            weight = "bold" if text.endswith("0.80") else "normal"
            box(axes, (place, y), (wide, high), role, text, TEXT, weight=weight)
        label(axes, (places[7] + places[8]) / 2, y, "· · ·", TEXT)
        label(axes, left, y + 0.34, title, ha="left")

    row(
        4.0,
        "plain",
        [f"{weight:.2f}".replace("-", "−") for weight in weights],
        "a block of 64 weights in float32; the largest magnitude is its scale",
    )
    row(1.7, "quantized", list(map(str, codes)), "64 codes, 4 bits each")
    label(axes, left, 3.3, "the weight over the scale, and the 16 levels of NF4", ha="left")

    ruler, middle, half = 2.74, left + wide * 5.5, 2.9
    axes.plot((middle - half, middle + half), (ruler, ruler), color=INK, linewidth=1.3)
    for code, level in enumerate(levels):
        x = middle + half * level
        axes.plot([x, x], (ruler - 0.07, ruler + 0.07), color=INK, linewidth=1.3)
        label(axes, x, ruler - 0.2, str(code), SMALL, color=QUIET)
    exact, nearest = (middle + half * value for value in (weights[chosen] / scale, levels[codes[chosen]]))
    arrow(axes, (places[chosen], 4.0 - high / 2), (exact, ruler + 0.01))
    arrow(axes, (nearest, ruler - 0.32), (places[chosen], 1.7 + high / 2))

    row(
        0.72,
        "quantized",
        "0.80 0.71 0.93 0.88 0.65 0.79 0.84 0.90 0.75 0.97".split(),
        "256 scales, one for each block, 8 bits each; one float32 for all of them",
    )
    label(axes, left, 0.25, "4 + 8/64 + 32/(64 · 256) = 4.127 bits a weight", ha="left")
    return figure


@redrawable
def training_loop() -> Figure:
    """The five parts of a training step in a ring, with what each reads and what each writes."""
    figure, axes = canvas(
        7.5,
        2.4,
        "Five boxes in a row, joined by arrows, and an arrow from the last back to the first. Forward reads the batch "
        "and W, A, B, and writes logits and activations. Loss reads logits and targets and writes one number. Backward "
        "reads the activations and writes the gradients of A and B. Clip reads the gradients and writes shorter ones. "
        "Step reads gradients and moments and writes A, B and moments.",
    )
    parts = {
        "forward": ("batch, $W$, $A$, $B$", "logits,\nactivations"),
        "loss": ("logits,\ntargets", "one number"),
        "backward": ("activations,\n$W$, $A$, $B$", "gradients of\n$A$ and $B$"),
        "clip": ("gradients", "gradients,\nnot too long"),
        "step": ("gradients,\nmoments", "$A$, $B$,\nmoments"),
    }
    wide, apart, left, middle = 1.02, 1.3, 1.45, 1.5
    for text, y in (("reads", middle + 0.55), ("writes", middle - 0.55)):
        label(axes, 0.1, y, text, SMALL, ha="left", color=QUIET, style="italic")
    for number, (name, (reads, writes)) in enumerate(parts.items()):
        x = left + apart * number
        box(axes, (x, middle), (wide, 0.42), "trained" if name == "step" else "plain", name, TEXT + 1)
        label(axes, x, middle + 0.55, reads, SMALL)
        label(axes, x, middle - 0.55, writes, SMALL)
        if number:
            arrow(axes, (x - apart + wide / 2, middle), (x - wide / 2, middle))
    end, low = left + apart * 4 + wide / 2, 0.42
    around = [(end + 0.2, middle), (end + 0.2, low), (0.73, low), (0.73, middle)]
    arrow(axes, (end, middle), *around, (left - wide / 2, middle))
    label(axes, left + apart * 2, low - 0.17, "the next batch", SMALL, color=QUIET)
    return figure


@redrawable
def kept_for_backward() -> Figure:
    """What a training step holds in full fine-tuning, LoRA and QLoRA, as bars as long as the bytes are many."""
    figure, axes = canvas(
        7.2,
        3.5,
        "Three columns, full fine-tuning, LoRA and QLoRA, with a bar for each kind of bytes. Full fine-tuning: all "
        "weights are trained, gradients are as large as they, Adam's two moments twice as large. LoRA: all weights are "
        "there, frozen; adapter, gradients and moments are slivers. QLoRA: the frozen weights are in 4 bits, an eighth "
        "of the length. The activations that wait for backward are nearly the same in all three.",
    )
    rows = {"weights": 2.62, "gradients": 2.02, "Adam's moments": 1.42, "activations": 0.82}
    for name, y in rows.items():
        label(axes, 1.5, y, name, ha="right")
    unit, high = 0.8, 0.32
    columns = {
        "full fine-tuning": ["trained 1", "trained 1", "trained 2", "plain 1.3"],
        "LoRA": ["frozen 1 trained 0.05", "trained 0.05", "trained 0.1", "plain 1.35"],
        "QLoRA": ["quantized 0.13 trained 0.05", "trained 0.05", "trained 0.1", "plain 1.35"],
    }
    for number, (title, bars) in enumerate(columns.items()):
        left = 1.7 + 1.86 * number
        label(axes, left, 3.16, title, TEXT + 1, ha="left", weight="bold")
        axes.plot((left, left), (0.52, 2.92), color=QUIET, linewidth=1)
        for y, bar in zip(rows.values(), bars, strict=True):
            start, parts = left, bar.split()
            for role, share in zip(parts[::2], map(float, parts[1::2]), strict=True):
                length = unit * share
                box(axes, (start + length / 2, y), (length, high), role)
                start += length
    names = dict(trained="trained", frozen="frozen", quantized="frozen, in 4 bits", plain="kept for backward")
    label(axes, 1.5, 0.6, "more with the batch", SMALL, ha="right", color=QUIET)
    key(axes, 1.7, 0.2, names)
    return figure
