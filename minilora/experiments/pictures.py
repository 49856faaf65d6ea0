"""A figure as a file or in a notebook: it says in words what it shows, and holds the numbers that it was drawn from.

A picture is kept longer than the code that drew it. So a PNG from here has three texts in it: a description, for those
who do not see it; its recipe, the name of the function that drew it with that call's arguments; and its look, labels,
colours and marks as they were. `redrawn` calls the function of today with the arguments of then: where the two looks
differ, the picture is stale.
"""

import ast
import functools
import importlib
import inspect
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.figure
from matplotlib.colors import to_hex
from matplotlib.ticker import FixedFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FILE_DPI, NOTEBOOK_DPI = 200, 144
FILE_COLOURS, NOTEBOOK_COLOURS = 128, 32  # enough for a drawing; the fewer, the smaller is the notebook
Arguments = ParamSpec("Arguments")


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows as a picture when it is the last value of a cell. It needs no display."""

    said = ""
    recipe = ""

    @property
    def alt(self) -> str:
        """What the figure shows, in words: as it was set, or else its titles, axes and names."""
        return self.said or described(self)

    @alt.setter
    def alt(self, text: str):
        self.said = text

    def png(self, dpi: int = NOTEBOOK_DPI, colours: int = NOTEBOOK_COLOURS) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=dpi)
        texts = PngInfo()
        for key, text in (("Description", self.alt), ("Recipe", self.recipe), ("Look", "\n".join(look(self)))):
            texts.add_itxt(key, text, zip=True)
        picture = Image.open(drawn).convert("RGB").quantize(colours)
        picture.save(small, "PNG", optimize=True, dpi=(dpi, dpi), pnginfo=texts)
        return small.getvalue()

    def write(self, path: Path):
        path.write_bytes(self.png(FILE_DPI, FILE_COLOURS))

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return {"image/png": self.png(), "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def redrawable(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """A function of numbers and words whose figures know how they were made. It is called with `plain` arguments."""

    @functools.wraps(draw)
    def drawing(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        arguments = plain(inspect.signature(draw).bind(*args, **kwargs).arguments)
        figure = draw(**arguments)  # type: ignore[call-arg]
        figure.recipe = repr((f"{draw.__module__}:{draw.__qualname__}", arguments))
        return figure

    return drawing


def plain(value: Any) -> Any:
    """The value made of Python's own kinds, floats with six digits: as much as is seen, and as `repr` writes it."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0:
        return list(map(plain, value))
    number = float(value)
    return float(f"{number:.6g}") if number == number else None  # a NaN leaves a gap


def texts_of(png: bytes) -> dict[str, str]:
    """The description, the recipe and the look in a picture."""
    return dict(getattr(Image.open(io.BytesIO(png)), "text", {}))


def redrawn(recipe: str) -> Figure:
    """The figure that today's code draws with the recipe's arguments. Only a function of our own is called."""
    name, arguments = ast.literal_eval(recipe)
    module, _, function = name.partition(":")
    assert module.startswith("minilora.experiments."), f"{name} is not a function that draws"
    return getattr(importlib.import_module(module), function)(**arguments)


def look(figure: matplotlib.figure.Figure) -> list[str]:
    """Labels, colours, marks and extents, a line each, without what depends on fonts or on the size."""
    lines = []
    legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
    for text in [*figure.texts, *(text for legend in legends for text in legend.get_texts())]:
        lines.append(f"text {text.get_text()!r}")
    for axes in figure.axes:
        names = [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            names += formatter.seq if isinstance(formatter, FixedFormatter) else []
        lines.append(f"axes {axes.get_xscale()} {axes.get_yscale()} {names}")
        for line in axes.lines:
            mark = f"{line.get_linestyle()} {line.get_marker()}"
            lines.append(
                f"curve {hexed(line.get_color())} {mark} {extent(line.get_xdata())} {extent(line.get_ydata())}"
            )
        for patch in axes.patches:
            lines.append(f"patch {hexed(patch.get_facecolor())} {patch.get_hatch()}")
        for collection in (each for each in axes.collections if each.get_array() is None):  # not what has a colour bar
            lines.append(f"{type(collection).__name__} {sorted({hexed(face) for face in collection.get_facecolor()})}")
    return lines


def hexed(colour: Any) -> str:
    return to_hex(colour)


def extent(values: Any) -> str:
    """How many and, of numbers, from where to where."""
    numbers = [value for value in values if isinstance(value, float | int) and value == value]
    return f"{len(numbers)} {min(numbers):.3g} {max(numbers):.3g}" if numbers else ""


def described(figure: matplotlib.figure.Figure) -> str:
    """The titles, the axes and the names of what is drawn, as a sentence each."""
    parts = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    for axes in figure.axes:
        across, up = axes.get_xlabel(), axes.get_ylabel()
        parts.append(f"Across: {across}" if across else "")
        parts.append(f"Upward: {up}" if up else "")
    names = [name for axes in figure.axes for name in axes.get_legend_handles_labels()[1]]
    parts.append(f"Drawn: {', '.join(dict.fromkeys(names))}" if names else "")
    return ". ".join(" ".join(part.split()) for part in dict.fromkeys(parts) if part) + "."
