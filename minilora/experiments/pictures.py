"""A figure as a file or in a notebook: it says in words what it shows, and holds the numbers that it was drawn from.

A picture is kept longer than the code that drew it. So a PNG from here has three texts in it: a description, for those
who do not see it; its recipe, the name of the function that drew it with that call's arguments; and its look, labels,
colours and marks as they were. `redrawn` calls the function of today with the arguments of then: where the two looks
differ, the picture is stale. To draw all pictures of files and notebooks anew, without running what they show again:

    python -m minilora.experiments.pictures data/figures/*.png notebooks/*.ipynb
"""

import ast
import base64
import functools
import importlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.figure
from matplotlib.colors import to_hex
from matplotlib.ticker import FixedFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minilora.places import DATA
from minilora.storage.files import read_json

FILE_DPI, NOTEBOOK_DPI = 200, 144
COLOURS = 128  # enough for a drawing; a picture of all colours is three times as large
RECORDS = DATA / "claims"
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

    def png(self, dpi: int = NOTEBOOK_DPI) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=dpi)
        texts = PngInfo()
        for key, text in (("Description", self.alt), ("Recipe", self.recipe), ("Look", "\n".join(look(self)))):
            texts.add_itxt(key, text, zip=True)
        # An octree keeps the colour of a few small marks, which a median cut gives up for one more grey.
        picture = Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE)
        palette = picture.getpalette() or []
        picture.putpalette([255 if value == 254 else value for value in palette])  # white is white
        picture.save(small, "PNG", optimize=True, dpi=(dpi, dpi), pnginfo=texts)
        return small.getvalue()

    def write(self, path: Path):
        path.write_bytes(self.png(FILE_DPI))

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return {"image/png": self.png(), "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def redrawable(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """A function of numbers and words whose figures know how they were made. It is called with `plain` arguments."""

    @functools.wraps(draw)
    def drawing(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        arguments = inspect.signature(draw).bind(*args, **kwargs).arguments
        figure = draw(**plain(arguments))  # type: ignore[call-arg]
        figure.recipe = repr((f"{draw.__module__}:{draw.__qualname__}", plain(arguments, whole=False)))
        return figure

    return drawing


class Stored(dict):
    """A run's record as the ledger keeps it. A recipe does not repeat it, but names its place: a file, arm and seed."""

    def __init__(self, record: Mapping, place: tuple[str, str, int]):
        super().__init__(record)
        self.place = place


def plain(value: Any, whole: bool = True) -> Any:
    """The value made of Python's own kinds, floats with six digits: as much as is seen, and as `repr` writes it.

    whole: with the records of the ledger, and not with the names of their places.
    """
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Stored):
        return value if whole else {"stored": value.place}
    if isinstance(value, Mapping):
        return {key: plain(each, whole) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(each, whole) for each in value)
    if isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0:
        return [plain(each, whole) for each in value]
    number = float(value)
    return float(f"{number:.6g}") if number == number else None  # a NaN leaves a gap


def found(value: Any) -> Any:
    """The arguments with the records whose places they name."""
    if isinstance(value, dict) and "stored" in value:
        file, *run = value["stored"]
        return Stored(records_of(file)[tuple(run)], value["stored"])
    if isinstance(value, dict):
        return {key: found(each) for key, each in value.items()}
    return type(value)(map(found, value)) if isinstance(value, list | tuple) else value


@functools.cache
def records_of(file: str) -> dict[tuple, dict]:
    """By arm and seed, the records of one of the ledger's files."""
    return {(record["arm"], record["seed"]): record for record in read_json(RECORDS / f"{file}.json")["runs"]}


def texts_of(png: bytes) -> dict[str, str]:
    """The description, the recipe and the look in a picture."""
    return dict(getattr(Image.open(io.BytesIO(png)), "text", {})) if png else {}


def redrawn(recipe: str) -> Figure:
    """The figure that today's code draws with the recipe's arguments. Only a function of our own is called."""
    name, arguments = ast.literal_eval(recipe)
    module, _, function = name.partition(":")
    assert module.startswith("minilora.experiments."), f"{name} is not a function that draws"
    return getattr(importlib.import_module(module), function)(**found(arguments))


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


def draw_anew(path: Path):
    """Draws a PNG, or all of a notebook's pictures that say how they are drawn, with today's code."""
    if path.suffix != ".ipynb":
        return redrawn(texts_of(path.read_bytes())["Recipe"]).write(path)
    book = json.loads(path.read_text(encoding="utf-8"))
    for output in (output for cell in book["cells"] for output in cell.get("outputs", [])):
        texts = texts_of(base64.b64decode(output.get("data", {}).get("image/png", "")))
        if "Recipe" in texts:
            data, output["metadata"] = redrawn(texts["Recipe"])._repr_mimebundle_()
            picture = base64.b64encode(data["image/png"]).decode() + "\n"
            output["data"] = {"image/png": picture, "text/plain": [data["text/plain"]]}
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw_anew(Path(name))
