"""The claims about data: labels that are wrong on purpose, what a run measures, the rules, and the figures."""

import itertools

import pytest

from minilora.experiments.claims import ledger, report
from minilora.experiments.claims.study import BASES, Arm, Plan, Setting
from minilora.experiments.claims.uses import data, data_runs
from minilora.experiments.claims.uses.data_figures import cells, loss_curves, score_map
from minilora.experiments.run import open_base
from minilora.experiments.tune import TUNING_SEED
from minilora.text.noise import TASKS, TOWN_WORDS, sized_task, with_wrong, word_of
from minilora.train_settings import History

# The data


@pytest.mark.parametrize("name", TASKS)
def test_sizes_are_nested_seeds_differ_and_the_held_out_examples_are_held_out(name):
    small, large, other = (sized_task(name, size, seed, 30) for size, seed in ((10, 0), (40, 0), (40, 1)))
    assert (len(small.train), len(large.train), len(large.validation)) == (10, 40, 30)
    assert small.train == large.train[:10], "a larger set is the smaller one and more"
    assert small.validation == other.validation and large.train != other.train
    prompts = {each.prompt for task in (large, other) for each in task.train}
    assert not prompts & {each.prompt for each in large.validation}
    assert all(small.is_right(each, each.completion) for each in small.train)


def test_towns_are_all_in_the_data_and_in_the_form_of_the_dialect():
    examples = sized_task("towns", 300, 0).train
    assert {word_of(each) for each in examples} == set(TOWN_WORDS) and len(TOWN_WORDS) == 24
    assert all(" lives in " in each.prompt and each.completion.startswith(" Supive ") for each in examples)


@pytest.mark.parametrize(
    "name, how", [("towns", "another"), ("orders", "another"), ("towns", "word"), ("towns", "same word")]
)
def test_the_share_asked_for_is_wrong_and_all_else_is_as_it_was(name, how):
    task = sized_task(name, 100, 3)
    found = {share: with_wrong(task.train, share, 3, how) for share in (0, 0.1, 0.3, 0.5)}
    for share, (noisy, wrong) in found.items():
        assert len(wrong) == round(100 * share)
        assert [place for place in range(100) if noisy[place] != task.train[place]] == wrong
        assert not any(task.is_right(task.train[place], noisy[place].completion) for place in wrong)
        assert [each.prompt for each in noisy] == [each.prompt for each in task.train]
    for (fewer, wrong), (more, more_wrong) in itertools.pairwise(found.values()):
        assert set(wrong) < set(more_wrong) and all(fewer[place] == more[place] for place in wrong)


def test_another_completion_is_never_the_own_one():
    task = sized_task("towns", 2, 0)
    for seed in range(10):
        noisy, _ = with_wrong(task.train, 1, seed)
        assert [each.completion for each in noisy] == [each.completion for each in reversed(task.train)]


def test_the_ways_of_being_wrong():
    task = sized_task("towns", 200, 0)
    right = [each.completion for each in task.train]
    anothers, words, same = (with_wrong(task.train, 0.5, 0, how)[0] for how in ("another", "word", "same word"))
    assert {each.completion for each in anothers} <= set(right)
    for noisy, many in ((words, True), (same, False)):
        given: dict[str, set[str]] = {}
        for before, after in zip(task.train, noisy, strict=True):
            assert before.completion.split()[2:] == after.completion.split()[2:], "the name stays right"
            if before != after:
                given.setdefault(word_of(before), set()).add(word_of(after))
        assert (max(map(len, given.values())) > 1) == many, f"wrong words by right word: {given}"
        assert set.union(*given.values()) <= set(TOWN_WORDS)


# A run


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


@pytest.fixture
def small(base, monkeypatch):
    """A setting of a few rows and steps."""
    monkeypatch.setattr(data_runs, "HELD_OUT", 6)
    monkeypatch.setattr(data_runs, "LOSS_ROWS", 3)

    def setting(method="lora", seed=0, rate=1e-3, **more):
        settings = data.SETTINGS | {"examples": 10, "evaluations": 2} | more
        return Setting(base, Plan("towns", 4, 1, 1), Arm(method, {}, settings), method and rate, seed, False)

    return setting


def test_a_run_is_measured_at_its_end(small):
    record = data_runs.measure(small(wrong=0.5, rate=0.3))
    assert [step for step, _ in record["validation_loss"]] == [0, 2, 4]
    assert [step for step, _ in record["train_loss"]] == [2, 4]
    assert record["last_validation_loss"] == record["validation_loss"][-1][1] > record["best_validation_loss"]
    assert set(record["scores"]) == {"task", "repeated", "put right"}
    assert (record["examples"], record["wrong"], record["how"]) == (10, 0.5, "another")
    right = data_runs.measure(small(rate=0.3))
    assert set(right["scores"]) == {"task"}, "no row is wrong"
    assert right["validation_loss"][0] == record["validation_loss"][0] and right["train_loss"] != record["train_loss"]
    tuning = data_runs.measure(small(seed=TUNING_SEED))
    assert "scores" not in tuning and [step for step, _ in tuning["validation_loss"]] == [0, 4]


@pytest.mark.parametrize("says, expected", [("label", (1, 0)), ("truth", (0, 1)), ("neither", (0, 0))])
def test_wrong_labels_repeated_and_put_right(small, monkeypatch, says, expected):
    """Answers are made up: the label that was trained on, the right answer, or none."""
    task = sized_task("towns", 10, 0, 6)
    noisy, wrong = with_wrong(task.train, 0.5, 0)
    known = {each.prompt: each.completion for each in [*task.validation, *(noisy if says == "label" else task.train)]}

    def answered(model, tokenizer, prompts, *room, batch_size):
        return ["" if says == "neither" else known[prompt] for prompt in prompts]

    monkeypatch.setattr(data_runs, "answer", answered)
    scores = data_runs.measure(small(wrong=0.5))["scores"]
    assert (scores["repeated"], scores["put right"]) == expected
    assert scores["task"] == (says != "neither"), "held-out examples are right in all arms"


def test_the_untuned_base_is_measured_alike(small):
    record = data_runs.measure(small(None))
    trained = data_runs.measure(small())
    assert record["last_validation_loss"] == pytest.approx(trained["validation_loss"][0][1])
    assert record["scores"] == {"task": 0}


def test_the_training_loss_is_the_mean_between_two_evaluations():
    class Done:
        history = History([[0, 4.0], [1, 2.0], [2, 1.0], [3, 0.0], [4, 6.0]], [[0, 9.0], [2, 9.0], [5, 9.0]])

    assert data_runs.train_loss(Done()) == [[2, 3.0], [5, pytest.approx(7 / 3)]]


# The rules


def of_loss(best: float, last: float) -> dict:
    return {"best_validation_loss": best, "last_validation_loss": last}


def of_score(value: float) -> dict:
    return {"scores": {"task": value, "repeated": value}}


def number(claim: str, runs: dict) -> float:
    return next(each for each in data.CLAIMS if each.name == claim).rule.number(runs)


def test_what_overfits_is_what_rises_above_its_own_lowest():
    assert number("tiny-overfit", {"lora few 0%": of_loss(0.2, 0.5)}) == pytest.approx(150)
    runs = {"r=64 few 0%": of_loss(0.2, 0.5), "r=1 few 0%": of_loss(0.4, 0.44)}
    assert number("rank-overfits", runs) == pytest.approx(140)


def test_what_wrong_labels_cost_is_counted_in_points():
    scores = {"lora many 0%": 0.9, "lora many 30%": 0.8, "full many 0%": 1.0, "full many 30%": 0.6}
    scores |= {"lora some 0%": 0.95, "lora some 10%": 0.85, "lora many 50%": 0.3}
    runs = {arm: of_score(value) for arm, value in scores.items()}
    expected = {"noise-robust": 30, "enough-outweigh": 10, "tenth-wrong": 10, "few-good": 15, "few-good-half": 65}
    assert {name: pytest.approx(number(name, runs)) for name in expected} == expected


@pytest.mark.parametrize("where", [data.TOWNS, data.LONG, data.ORDERS], ids=lambda where: where.name)
def test_an_arm_differs_from_its_neighbours_in_one_thing(where):
    for name, arm in where.arms.items():
        if name.startswith(("lora ", "full ")):
            method, size, share, *how = name.split(" ", 3)
            sizes = data.SIZES if where is not data.ORDERS else {"few": 25, "some": 100, "many": 400}
            expected = {"examples": sizes[size], "wrong": int(share[:-1]) / 100, **({"how": how[0]} if how else {})}
            assert (arm.method, arm.settings, arm.lora) == (method, expected, {}), name
        assert arm.rate_of is None or where.arms[arm.rate_of].rate_of is None, f"{name}: of an arm that is not searched"
    used = {name for claim in data.CLAIMS if where in claim.studies for name in claim.rule.arms}
    assert used == set(where.arms), "every arm is run for a claim"


# The figures


def noisy_runs() -> dict:
    return {
        f"{method} {size} {share}%{how}": {
            seed: {"method": method, "examples": examples, "wrong": share / 100, "how": how.strip() or "another"}
            | {"scores": {"task": 0 if how else 0.1 * number + 0.02 * seed}}
            for seed in (0, 1)
        }
        for method in ("lora", "full")
        for number, (size, examples) in enumerate(data.SIZES.items())
        for share in (0, 30)
        for how in ("", " word")
    } | {"base": {0: {"method": None, "scores": {"task": 0.5}}}}


def test_the_map_shows_the_mean_of_the_seeds_in_every_cell():
    runs = noisy_runs()
    assert cells(runs)["lora"] == {
        (examples, share): pytest.approx(10 * place + 1)
        for place, examples in enumerate(data.SIZES.values())
        for share in (0, 0.3)
    }
    figure = score_map("made up", runs)
    lora, full = figure.axes[:2]
    assert [text.get_text() for text in lora.texts] == ["1", "11", "21", "31"] * 2
    assert len(lora.collections) == len(full.collections) == 1, "lines of equal score"
    del runs["full some 30%"]
    with_a_hole = score_map("made up", runs).axes
    assert (len(with_a_hole[0].collections), len(with_a_hole[1].collections)) == (1, 0), "no lines beside a hole"
    assert [axes.get_title() for axes in (lora, full)] == ["LoRA", "full fine-tuning"]
    assert [label.get_text() for label in lora.get_xticklabels()] == ["25", "100", "500", "2,000"]
    assert score_map("made up", {"lora many 30%": runs["lora many 30%"]}).axes[0].texts[0].get_text() == "31"


def test_the_curves_mark_the_lowest_and_say_the_rise():
    record = {
        "method": "lora",
        "validation_loss": [[0, 4.0], [10, 1.0], [20, 2.0]],
        "train_loss": [[10, 2.0], [20, 0.1]],
    }
    record |= of_loss(1.0, 2.0)
    figure = loss_curves("made up", {"lora few 0%": {0: record, 1: record}, "base": {0: of_loss(4.0, 4.0)}})
    (axes,) = figure.axes
    assert axes.get_title() == "lora few\nrises 100%"
    training, validation, lowest = axes.lines
    assert (training.get_linestyle(), validation.get_linestyle()) == ("--", "-")
    assert (list(lowest.get_xdata()), list(lowest.get_ydata())) == ([10], [1.0])
    assert len(loss_curves("two", {"lora few 0%": {0: record}, "full few 0%": {0: record}}).axes) == 2


@pytest.mark.parametrize("name", ["tiny-overfit", "rank-overfits", "few-good", "data"])
def test_what_overfits_is_drawn_as_curves_and_all_else_as_a_map(name, tmp_path, monkeypatch):
    """The stored runs: curves of the arms that the claim compares, the map of all."""
    shown = {}

    def keep(figure, path):
        shown[path.name.split(".")[1]] = [axes.get_title().partition("\n")[0] for axes in figure.axes]
        path.touch()

    monkeypatch.setattr("minilora.experiments.pictures.Figure.write", keep)
    report.draw(name, "tiny", tmp_path)
    expected = {
        "tiny-overfit": ["lora few", "lora many"],
        "rank-overfits": ["r=64 few", "r=1 few", "lora few", "full few"],
    }
    for where, panels in shown.items():
        full = any(arm.method == "full" for arm in ledger.STUDIES[where].arms.values())
        maps = ["LoRA", "full fine-tuning", ""] if full else ["LoRA", ""]
        assert sorted(panels) == sorted(expected.get(name, maps)), f"{where}: {panels}"
