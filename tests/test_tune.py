"""The choice of a learning rate: the search finds the valley, and what is stored says how it was found."""

import json
import math
from dataclasses import replace

import pytest

from minilora.experiments import run as run_file
from minilora.experiments import tune as tune_file
from minilora.experiments.methods import METHODS
from minilora.experiments.run import Run
from minilora.experiments.tune import TUNING_SEED, grid_of, search, tune
from minilora.train_settings import History, NonFiniteError

GRID = [3e-3, 1e-2, 3e-2]


@pytest.fixture
def rates(monkeypatch, tmp_path, base_folder):
    """A file of rates of our own, in which another method was tuned before. The base of the tests counts as shipped."""
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"words": {"full": {"chosen": 0.5}}, "json": {"lora": {"chosen": 0.25}}}))
    monkeypatch.setattr(run_file, "BASE", base_folder.directory)
    monkeypatch.setattr(tune_file, "LEARNING_RATES", path)
    return path


@pytest.fixture
def runs(monkeypatch):
    """Runs that take no time: the best loss lies at a rate of 0.01 for lora, at 0.1 for others; above 1 they diverge.

    The loss after the last step is another one. Returns what was run, (method, rate, seed).
    """
    ran = []

    def run(experiment, progress):
        rate, method = experiment.training.learning_rate, experiment.method
        ran.append((method, rate, experiment.training.seed))
        if rate > 1:
            raise NonFiniteError("diverged")
        loss = abs(math.log10(rate / (0.01 if method == "lora" else 0.1)))
        return Run(experiment, None, History(validation_loss=[[0, 9.0], [1, loss], [2, 8.0 - loss]]))

    monkeypatch.setattr(tune_file, "run", run)
    return ran


def test_each_method_has_the_grid_that_suits_it():
    low, middle, high = [1e-3, 3e-3, 1e-2], [3e-3, 1e-2, 3e-2], [3e-2, 1e-1, 3e-1]
    expected = dict.fromkeys(METHODS, middle) | dict.fromkeys(("full", "lora+", "pissa"), low)
    expected |= dict.fromkeys(("soft-prompt", "prefix"), high)
    for method in METHODS:
        assert grid_of(method) == expected[method], f"{method} should begin with {expected[method]}"


@pytest.mark.parametrize("valley", [1e-4, 1e-2, 1.0])
def test_the_search_goes_on_until_both_neighbours_are_worse(valley):
    losses = search(lambda rate: abs(math.log(rate / valley)), GRID)
    best = min(losses, key=losses.get)
    assert best == pytest.approx(valley, rel=0.3), f"the valley lies at {valley}, and {best} was found: {losses}"
    assert min(losses) < best < max(losses), f"{best} lies at an end of what was tried: {losses}"


@pytest.mark.parametrize(
    "valley, expected",
    [
        (1e-2, [3e-3, 1e-2, 3e-2]),
        (3e-2, [3e-3, 1e-2, 3e-2, 9e-2]),
        (2e-3, [9e-4, 3e-3, 1e-2, 3e-2]),  # 3e-3² / 1e-2
        (3e-4, [1e-4, 3e-4, 9e-4, 3e-3, 1e-2, 3e-2]),
        (0.3, [3e-3, 1e-2, 3e-2, 9e-2, 0.3, 1.0]),
    ],
)
def test_the_grid_is_extended_by_its_own_factor_in_round_numbers(valley, expected):
    tried = sorted(search(lambda rate: abs(math.log(rate / valley)), GRID))
    assert tried == pytest.approx(expected, rel=1e-12), f"with the valley at {valley}: {expected}, not {tried}"


def test_a_finer_search_tries_both_rates_beside_the_best_at_last():
    tried = sorted(search(lambda rate: abs(math.log(rate / 2e-3)), GRID, finer=True))
    expected = [9e-4, 1.6e-3, 3e-3, 5.5e-3, 1e-2, 3e-2]
    assert tried == pytest.approx(expected, rel=1e-12), f"two rates about 3e-3 are new: {expected}, not {tried}"


def test_a_diverged_neighbour_ends_the_search():
    losses = search(lambda rate: None if rate > 0.02 else -rate, GRID)
    assert losses == {3e-3: -3e-3, 1e-2: -1e-2, 3e-2: None}, f"1e-2 has two worse neighbours: {losses}"


def test_a_method_that_always_diverges_is_not_searched_for():
    assert search(lambda rate: None, GRID) == dict.fromkeys(GRID), "three rates, none of which has a loss"


def test_what_is_stored_says_how_it_was_found(make_experiment, runs, rates):
    experiments = [make_experiment(method) for method in ("lora", "prefix")]
    chosen = tune(experiments, progress=False)
    expected = {
        "grid": [
            {"learning_rate": 3e-3, "validation_loss": pytest.approx(math.log10(10 / 3))},
            {"learning_rate": 1e-2, "validation_loss": pytest.approx(0)},
            {"learning_rate": 3e-2, "validation_loss": pytest.approx(math.log10(3))},
        ],
        "chosen": 1e-2,
        "steps": 3,
        "batch_size": 4,
        "seed": 1000,
        **experiments[0].method_settings,
    }
    assert chosen["lora"] == expected, f"expected {expected}, got {chosen['lora']}"
    assert (chosen["prefix"]["chosen"], chosen["prefix"]["virtual_tokens"]) == (0.1, 3), chosen["prefix"]
    stored = json.loads(rates.read_text())
    kept = stored["words"].pop("full"), stored["json"]
    assert kept == ({"chosen": 0.5}, {"lora": {"chosen": 0.25}}), f"what was tuned before must stay: {stored}"
    assert stored["words"] == json.loads(json.dumps(chosen)), f"what is stored is what was chosen: {stored['words']}"
    assert {seed for *_, seed in runs} == {TUNING_SEED}, f"tuning has a seed of its own, 1000: {runs}"
    tried = [(method, rate) for method, rate, _ in runs]
    assert tried == [*(("lora", rate) for rate in GRID), *(("prefix", rate) for rate in grid_of("prefix"))], tried


@pytest.mark.parametrize("wide", [False, True])
def test_another_base_has_a_place_of_its_own(make_experiment, runs, rates, monkeypatch, tmp_path, wide):
    """Its choices must not become those of the shipped one, whatever its width."""
    monkeypatch.setattr(tune_file, "is_wide", lambda base: wide)
    monkeypatch.setattr(run_file, "BASE", tmp_path)
    experiment = make_experiment("lora")
    tune([experiment], progress=False)
    stored = json.loads(rates.read_text())
    assert set(stored) == {"words", "json", f"{experiment.base.name}/words"}, f"stored under {list(stored)}"
    assert stored["words"] == {"full": {"chosen": 0.5}}, f"the shipped base's were changed: {stored['words']}"


@pytest.mark.parametrize("rates_file", ["{", "[]", '{"words": 3}', '{"words": {"lora": {"chosen": "fast"}}}'])
def test_a_damaged_file_of_rates_is_named_before_anything_runs(make_experiment, runs, rates, rates_file):
    rates.write_text(rates_file)
    with pytest.raises(ValueError, match="rates.json"):
        tune([make_experiment()], progress=False)
    assert not runs and rates.read_text() == rates_file, f"ran {runs}"


def test_a_wide_base_has_lower_grids(make_experiment, runs, rates, monkeypatch):
    monkeypatch.setattr(tune_file, "is_wide", lambda base: True)
    tune([make_experiment("lora")], progress=False)
    assert [rate for _, rate, _ in runs][:3] == [1e-3, 3e-3, 1e-2], f"tried {runs}"
    for method in METHODS:
        assert max(grid_of(method, wide=True)) < max(grid_of(method)), f"{method}: a wide base wants smaller steps"


def test_a_rate_that_diverges_is_kept_on_record_and_not_chosen(make_experiment, runs, rates, monkeypatch):
    monkeypatch.setattr(tune_file, "grid_of", lambda method, wide: [1.0, 0.1, 3.0])
    grid = tune([make_experiment("prefix")], progress=False)["prefix"]["grid"]
    losses = {row["learning_rate"]: row["validation_loss"] for row in grid}
    assert list(losses) == sorted(losses) and losses[3.0] is None, f"in order, with None where it diverged: {grid}"
    # json has null for None, and reads it back
    assert json.loads(rates.read_text())["words"]["prefix"]["grid"][-1] == {
        "learning_rate": 3.0,
        "validation_loss": None,
    }


def test_a_grid_that_diverges_throughout_is_named(make_experiment, runs, rates, monkeypatch):
    before = rates.read_text()
    monkeypatch.setattr(tune_file, "grid_of", lambda method, wide: [2.0, 4.0])
    with pytest.raises(ValueError, match="dora diverged at every rate of its grid, 2.0, 4.0"):
        tune([make_experiment("dora")], progress=False)
    assert rates.read_text() == before, "nothing was found, so nothing may be stored"


def test_the_first_choice_makes_the_file(make_experiment, runs, rates):
    rates.unlink()
    training = replace(make_experiment().training, learning_rate=7.0)  # its own rate is not used
    tune([make_experiment(training=training)], progress=False)
    stored = json.loads(rates.read_text())
    assert list(stored) == ["words"] and stored["words"]["lora"]["chosen"] == 0.01, stored


def test_what_another_search_stores_meanwhile_is_kept(rates, runs, make_experiment, monkeypatch):
    """Rates are read and written under one lock, which another search waits for."""
    read, locked = tune_file.read_rates, []

    def watched(path):
        locked.append(rates.with_name(".rates.json.lock").is_file())
        return read(path)

    monkeypatch.setattr(tune_file, "read_rates", watched)
    tune([make_experiment("lora")], progress=False)
    assert locked[-1], "between the last reading and the writing another search may store a rate, which would be lost"
    assert json.loads(rates.read_text()).keys() == {"words", "json"}
