"""Figures: one look for each method, names that hide nothing, and pictures that can be drawn again from themselves."""

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from minilora.experiments import drawings, figures, looks, notebook_figures, pictures
from minilora.experiments.claims import ledger
from minilora.experiments.pictures import Figure, look, plain, redrawable, redrawn, texts_of

ROOT = Path(__file__).parents[1]
PALETTE = {looks.BLUE, looks.VERMILION, looks.GREEN, looks.PINK, looks.ORANGE, looks.SKY, looks.BLACK, looks.GREY}


# Looks


def test_every_method_is_known_by_its_marker_alone():
    curves = [each for name, each in looks.LOOKS.items() if name not in ("base", "limit")]
    for group in (curves, looks.OTHERS):
        assert len({each.marker for each in group}) == len(group), "two share a marker"
        assert {each.colour for each in group} <= PALETTE
        assert len({(each.colour, each.line) for each in group}) == len(group), "two share colour and line"


def test_what_is_no_method_takes_no_method_s_colour():
    names = ["q_proj", "lora", "random", "full"]
    found = looks.looks_of(names)
    assert list(found) == names and found["lora"] == looks.LOOKS["lora"]
    assert len({each.colour for each in found.values()}) == 4 and found["random"].label == "random"


def test_colours_are_written_in_one_place():
    own = ("looks.py", "shapes.py")
    for path in (ROOT / "minilora/experiments").rglob("*.py"):
        found = re.findall(r"[\"']#[0-9A-Fa-f]{6}[\"']", path.read_text(encoding="utf-8"))
        assert path.name in own or not found, f"{path.name} has a palette of its own: {found}"


def test_names_of_curves_do_not_overlap():
    places = looks.apart([0.1, 0.11, 0.5, 0.99, 0.995, 1.0], 0.07)
    assert all(b - a >= 0.07 - 1e-9 for a, b in zip(places, places[1:], strict=False)) and places[-1] <= 1
    assert places[:3] == pytest.approx([0.07, 0.14, 0.5]), "two are spread around their middle; what has room stays"
    assert looks.apart([0.0, 0.01], 0.1) == pytest.approx([0, 0.1]), "none below the axes"


def test_ticks_of_a_logarithmic_axis_do_not_overlap():
    xs = [0.382 / 2**k for k in range(8)]
    draw = dict(xlabel="x", ylabel="y", title="made up", log_x=True)
    axes = notebook_figures.lines({"lora": (xs, xs)}, **draw).axes[0]
    assert_apart(axes.get_xticklabels())
    assert axes.get_xticklabels()[-1].get_text() == "0.382", "the last is named, and from there every second"
    few = notebook_figures.lines({"lora": ([1, 2, 4], [1, 2, 4])}, **draw).axes[0]
    assert [label.get_text() for label in few.get_xticklabels()] == ["1", "2", "4"], "where there is room, all are"


def test_names_of_points_do_not_overlap():
    case = next(case for case in ledger.find("overlap-subspaces") if case.scale == "tiny")
    figure = ledger.CLAIMS["overlap-subspaces"].figure(case.title, ledger.reported(case.study, case.scale))
    assert_apart(figure.axes[0].texts)


def assert_apart(texts: list):
    """No two texts of a figure that is drawn lie on each other."""
    figure = texts[0].figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts if text.get_text()]
    assert len(boxes) > 1
    for number, (name, box) in enumerate(boxes):
        on = [other for other, its in boxes[:number] if box.overlaps(its)]
        assert not on, f"{name!r} lies on {on}"


def test_a_curve_is_named_at_its_end_and_otherwise_below_the_axes():
    whole, short = ([0, 1, 2], [3, 2, 1]), ([0, 1], [3, 2])
    draw = dict(xlabel="steps", ylabel="loss", title="made up")
    figure = notebook_figures.lines({"lora": whole, "full": whole}, **draw)
    assert {text.get_text() for text in figure.axes[0].texts} == {"LoRA", "full fine-tuning"} and not figure.legends
    figure = notebook_figures.lines({"lora": whole, "full": short}, **draw)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "full fine-tuning"]
    assert not figure.axes[0].texts and figure.axes[0].get_legend() is None


def results(seeds: int) -> dict:
    """As compare writes them, of two methods that train and reach the same."""
    row = {"trainable_parameters": 1000, "total_parameters": 9000, "best_validation_loss": 0.01, "score": 1.0}
    row |= {"validation_loss": [[0, 3.0], [10, 0.01]], "bytes": dict.fromkeys([*figures.KINDS, "peak"], 10)}
    methods = [{"method": method, **row} for method in ("full", "lora", "qlora") for _ in range(seeds)]
    return {"task": "json", "seeds": list(range(seeds)), "loss_floor": 0, "score_before": 0.0, "runs": methods}


def test_methods_in_one_place_do_not_hide_each_other():
    """Each has a row of its own; scores are shown from 0 to 1, and one seed is one."""
    figure = figures.loss_over_parameters(results(seeds=1))
    assert figure.get_suptitle() == "Task: json, 1 seed"
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["full fine-tuning", "LoRA", "QLoRA"]
    for axes in figure.axes:
        assert sorted({float(line.get_ydata()[0]) for line in axes.lines}) == [0, 1, 2]
    low, high = figure.axes[-1].get_xlim()
    assert low < 0 and high > 1 and figures.loss_over_parameters(results(3)).get_suptitle().endswith("3 seeds")


# Drawings


@pytest.mark.parametrize("name", drawings.__all__)
def test_a_drawing_is_readable(name):
    """No text is small, crosses another or leaves the picture; what is seen is also said in words."""
    figure = getattr(drawings, name)()
    assert len(figure.alt) > 100 and re.match("[A-Z].*[.]$", figure.alt, re.DOTALL), "no alt text"
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = {}
    for text in figure.axes[0].texts:
        if text.get_text():
            assert text.get_fontsize() >= 9, f"{text.get_text()!r} has {text.get_fontsize()} points"
            boxes[text] = text.get_window_extent(renderer)
    width, height = figure.bbox.width, figure.bbox.height
    for number, (text, box) in enumerate(boxes.items()):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text.get_text()!r} is cut off"
        for other in list(boxes)[:number]:
            assert not box.overlaps(boxes[other]), f"{text.get_text()!r} lies on {other.get_text()!r}"


# Pictures


@redrawable
def made_up(values: list, label: str) -> Figure:
    figure, (axes,) = looks.new_figure(2, 1)
    axes.plot(values, label=label, color=looks.BLUE)
    axes.set(title="made up", xlabel="steps")
    return figure


def test_a_picture_says_what_it_shows_and_how_it_is_drawn_again(tmp_path):
    figure = made_up([1, 1 / 3, float("nan")], label="né")
    figure.write(tmp_path / "a.png")
    texts = texts_of((tmp_path / "a.png").read_bytes())
    assert texts["Description"] == figure.alt == "made up. Across: steps. Drawn: né."
    assert texts["Recipe"] == repr(("test_figures:made_up", {"values": [1, 0.333333, None], "label": "né"}))
    assert texts["Look"] == "\n".join(look(made_up([1, 0.333333, None], "né")))
    data, more = figure._repr_mimebundle_()
    assert data["text/plain"] == more["image/png"]["alt"] == figure.alt
    figure.alt = "in other words"
    assert texts_of(figure.png())["Description"] == "in other words"


def test_the_colour_of_a_small_mark_is_kept():
    """Among many greys and tints: a picture has 128 colours, and the palette is among them."""
    figure, (axes,) = looks.new_figure(5, 3)
    axes.imshow([list(range(50))] * 2, cmap="cividis", aspect="auto")
    for place, colour in enumerate(sorted(PALETTE)):
        axes.plot([5 * place + 2], [0.5], "o", color=colour, markersize=4)
    with pictures.Image.open(io.BytesIO(figure.png())) as picture:
        found = {colour for _, colour in picture.convert("RGB").getcolors()}
    assert (255, 255, 255) in found
    for colour in PALETTE:
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        off = min(max(abs(a - b) for a, b in zip(each, wanted, strict=True)) for each in found)
        assert off <= 12, f"{colour} has become one that is {off} of 255 away"


def test_arguments_are_kept_as_python_writes_them():
    @dataclass
    class Number:
        value: float

        def __float__(self):
            return self.value

    kept = plain({"a": {0: (Number(1 / 3), True)}, "b": range(2), "c": {1: 2}.values(), "d": "word", "e": None})
    assert kept == {"a": {0: (0.333333, True)}, "b": [0, 1], "c": [2], "d": "word", "e": None}


def test_a_run_of_the_ledger_is_named_and_not_repeated():
    again = ledger.STUDIES["variants-python-code"]
    figure = again.figure("made up", ledger.reported(again, "tiny"))
    assert "{'stored': ('variants-python-code.tiny', 'dora', 0)}" in figure.recipe and "loss': [" not in figure.recipe
    assert look(redrawn(figure.recipe)) == look(figure)


@pytest.mark.parametrize("change", ["label", "colour", "marker", "values"])
def test_a_stale_picture_is_found(change, monkeypatch):
    curves = {"lora": ([0, 1], [2.0, 1.0])}
    texts = texts_of(notebook_figures.lines(curves, "steps", "loss", "made up").png(dpi=30))
    assert not stale(texts)
    lora = looks.LOOKS["lora"]
    other = {"label": dict(label="low rank"), "colour": dict(colour="#112233"), "marker": dict(marker="x")}
    monkeypatch.setitem(looks.LOOKS, "lora", lora._replace(**other.get(change, {})))
    if change == "values":
        texts["Recipe"] = texts["Recipe"].replace("2.0", "2.5")
    assert stale(texts)


def test_pictures_are_drawn_anew_without_running_what_they_show(tmp_path, monkeypatch):
    """In a file and in a notebook, whose other outputs stay as they are."""
    figure = notebook_figures.lines({"lora": ([0, 1], [2.0, 1.0])}, "steps", "loss", "made up")
    figure.write(tmp_path / "a.png")
    data, more = figure._repr_mimebundle_()
    data["image/png"] = base64.b64encode(data["image/png"]).decode()
    outputs = [{"output_type": "stream", "text": "é"}, {"output_type": "display_data", "data": data, "metadata": more}]
    book = {"cells": [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": outputs}], "nbformat": 4}
    (tmp_path / "a.ipynb").write_text(json.dumps(book), encoding="utf-8")
    monkeypatch.setitem(looks.LOOKS, "lora", looks.LOOKS["lora"]._replace(label="low rank"))
    for name in ("a.png", "a.ipynb"):
        assert stale(texts_of(pictures_in(tmp_path / name)[0]))
        pictures.draw_anew(tmp_path / name)
        assert not stale(texts_of(pictures_in(tmp_path / name)[0]))
    anew = json.loads((tmp_path / "a.ipynb").read_text(encoding="utf-8"))
    assert anew["cells"][1]["outputs"][0] == outputs[0] and anew["nbformat"] == 4
    assert anew["cells"][1]["outputs"][1]["metadata"]["image/png"]["alt"].endswith("Drawn: low rank.")


def test_only_a_function_that_draws_is_called():
    with pytest.raises(AssertionError, match="not a function that draws"):
        redrawn(repr(("os:system", {"command": "true"})))


# What is stored


def stale(texts: dict[str, str]) -> list[str]:
    """The lines in which a picture differs from what today's code draws."""
    stored, drawn = texts["Look"].split("\n"), look(redrawn(texts["Recipe"]))
    lines = [f"- {line}" for line in stored if line not in drawn] + [
        f"+ {line}" for line in drawn if line not in stored
    ]
    return lines or ["another order"] * (stored != drawn)


def pictures_in(path: Path) -> list[bytes]:
    if path.suffix == ".png":
        return [path.read_bytes()]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]


STORED = [*sorted((ROOT / "data/figures").glob("*.png")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_a_stored_picture_is_what_today_s_code_draws(path):
    every = [texts_of(png) for png in pictures_in(path)]
    if path.suffix == ".ipynb" and not any("Recipe" in texts for texts in every):
        pytest.skip("executed before pictures said how they are drawn")
    for number, texts in enumerate(every, 1):
        assert texts.get("Recipe"), f"picture {number} does not say how it was drawn: draw it anew"
        assert len(texts["Description"]) > 20, f"picture {number} has no words for those who do not see it"
        assert not stale(texts), f"picture {number} is not what is drawn today:\n" + "\n".join(stale(texts))


def test_stored_figures_are_sharp():
    for path in (ROOT / "data/figures").glob("*.png"):
        with pictures.Image.open(path) as picture:
            assert round(picture.info["dpi"][0]) >= 200, f"{path.name}: fewer than 200 dots per inch"
