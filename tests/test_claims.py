"""The ledger of claims: the interval, rules that can say no, runs that are kept, and verdicts that follow from them."""

import json
import math

import pytest

from minilora.__main__ import main
from minilora.experiments.claims import ledger
from minilora.experiments.claims.claim import T, interval
from minilora.experiments.tune import TUNING_SEED, grid_of

SPREAD = [0.98, 1.0, 1.01, 1.02, 0.99]  # of seeds, as a factor


def made_up(claim, gain: float, noise: float = 1.0) -> dict:
    """Runs in which `arm` is lower than `than` by so many percent. noise: how far seeds of one pair differ."""
    than = {seed: {"best_validation_loss": 2 * factor} for seed, factor in enumerate(SPREAD)}
    lower = {
        seed: {"best_validation_loss": run["best_validation_loss"] * (1 - gain / 100) * (1 + noise * (seed - 2) / 100)}
        for seed, run in than.items()
    }
    return {claim.rule.arm: lower, claim.rule.than: than}


@pytest.mark.parametrize("claim", ledger.CLAIMS.values(), ids=ledger.CLAIMS)
def test_each_rule_can_say_yes_no_and_open(claim):
    bar = 5 if claim.rule.gain else -5
    assert claim.rule.bar == bar and f"above {bar} %" in claim.rule.words
    cases = (
        (bar + 15, 1, "holds"),
        (bar - 15, 1, "fails"),
        (bar, 1, "open"),
        (bar + 10, 20, "open"),
        (bar - 3, 1, "fails"),
    )
    for gain, noise, verdict in cases:
        found = claim.rule.decide(made_up(claim, gain, noise))
        assert found.verdict == verdict, f"{gain} % with noise {noise}: expected {verdict}, got {found}"
        assert found.number == pytest.approx(gain, abs=0.5) and found.low < found.number < found.high


def test_a_gain_below_what_matters_does_not_hold():
    """A small gain, seen beyond doubt, is no reason to choose; a small loss is one that does not matter."""
    found = ledger.CLAIMS["dora"].rule.decide(made_up(ledger.CLAIMS["dora"], 2, 0.1))
    assert found.verdict == "fails" and found.low > 0
    found = ledger.CLAIMS["qlora"].rule.decide(made_up(ledger.CLAIMS["qlora"], -2, 0.1))
    assert found.verdict == "holds" and found.high < 0


def test_pairs_of_one_seed_are_compared():
    """Seeds that differ by much more than the arms do not hide a difference that each of them shows."""
    claim = ledger.CLAIMS["dora"]
    than = {seed: {"best_validation_loss": float(seed + 1)} for seed in range(5)}
    lower = {seed: {"best_validation_loss": 0.9 * (seed + 1)} for seed in range(7)}
    found = claim.rule.decide({"dora": lower, "lora": than})
    assert (found.verdict, found.seeds) == ("holds", 5) and found.high - found.low < 1e-9


def test_the_interval_is_that_of_student():
    low, mean, high = interval([1.0, 2.0, 3.0])
    half = 2.920 * 1.0 / math.sqrt(3)  # t at 95 % with two degrees of freedom; the deviation is 1
    assert (low, mean, high) == pytest.approx((2 - half, 2, 2 + half))
    assert all(a > b for a, b in zip(list(T.values()), list(T.values())[1:], strict=False)), "more seeds, less doubt"
    for values in ([1.0], [1.0] * (len(T) + 2)):
        with pytest.raises(ValueError, match=f"from 2 to {len(T) + 1} seeds, and there are {len(values)}"):
            interval(values)


# What is stored


@pytest.fixture
def book(monkeypatch, tmp_path):
    """A ledger of one claim with made-up runs that take no time; the best rate is 0.01. Returns what was run."""
    ran, place = [], ledger.environment("cpu")

    def measure(base, data, arm, steps, rate, seed, progress):
        ran.append((arm.method, rate, seed))
        loss = 1 + abs(math.log10(rate / 0.01)) - (0.2 if arm.method == "dora" else 0) + seed / 1e5
        record = {"method": arm.method, "steps": steps, "best_validation_loss": loss, "validation_loss": []}
        return record | {"score": None, "seconds": 0.0, "date": "2026-01-01", "environment": place}

    monkeypatch.setattr(ledger, "measure", measure)
    monkeypatch.setattr(ledger, "FOLDER", tmp_path)
    monkeypatch.setattr(ledger, "open_base", lambda *_: type("Base", (), {"tokenizer": None}))
    monkeypatch.setattr(ledger, "load_dataset", lambda *_: None)
    return ran


def test_rates_are_chosen_on_a_seed_that_is_not_reported(book):
    found = ledger.run_claim("dora", seeds=3)
    assert found.verdict == "holds" and found.seeds == 3
    assert {seed for _, rate, seed in book if rate != 0.01} == {TUNING_SEED}
    for arm in ("lora", "dora"):
        tried = sorted(rate for method, rate, seed in book if (method, seed) == (arm, TUNING_SEED))
        assert tried[0] < 0.01 < tried[-1] and set(grid_of(arm)) <= set(tried)
        assert [seed for method, _, seed in book if method == arm and seed != TUNING_SEED] == [0, 1, 2]


def test_a_killed_run_costs_one_run(book, monkeypatch, tmp_path):
    ledger.run_claim("dora", seeds=3)
    whole, expected = list(book), json.loads((tmp_path / "dora.tiny.json").read_text())
    (tmp_path / "dora.tiny.json").unlink()
    measure = ledger.measure
    for stop in range(len(whole)):
        done = len(json.loads((tmp_path / "dora.tiny.json").read_text())["runs"]) if stop else 0
        book.clear()

        def killed(*arguments):
            if book:
                raise KeyboardInterrupt
            return measure(*arguments)

        monkeypatch.setattr(ledger, "measure", killed)
        try:
            ledger.run_claim("dora", seeds=3)
        except KeyboardInterrupt:
            pass
        assert book == whole[done : done + 1], f"after {done} stored runs, {book} was run"
    assert json.loads((tmp_path / "dora.tiny.json").read_text()) == expected
    assert "holds" not in (tmp_path / "dora.tiny.json").read_text(), "a verdict is computed, never stored"


def test_runs_of_another_plan_are_refused(book, tmp_path):
    ledger.run_claim("dora", seeds=2)
    path = tmp_path / "dora.tiny.json"
    for change in ({"steps": 7}, {"arm": "pissa"}):
        content = json.loads(path.read_text())
        content["runs"][0] |= change
        (tmp_path / "dora.tiny.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="dora.tiny.json holds a run of .* not in the claim's plan"):
            ledger.finding(ledger.CLAIMS["dora"], "tiny")


def test_the_command_line(book, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["claims"]) == 0
    assert "| tiny | not run |" in capsys.readouterr().out
    assert main(["claims", "run", "dora", "--seeds", "2"]) == 0
    assert "holds: +20.0 % (" in capsys.readouterr().out and (tmp_path / "runs/claims/dora.tiny.png").is_file()
    assert main(["claims", "show", "dora"]) == 0
    said = capsys.readouterr().out
    for words in (ledger.CLAIMS["dora"].sentence, ledger.CLAIMS["dora"].rule.words, "(chooses the rate)"):
        assert words in said
    for words, message in ((["run"], "takes the name of a claim"), (["show", "x"], "there is no claim 'x'")):
        assert main(["claims", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["claims", "show", "dora", "--scale", "smollm2"]) == 2
    assert "not run at scale smollm2" in capsys.readouterr().err


def test_a_run_that_another_claim_made_is_not_made_again(book, monkeypatch, tmp_path):
    ledger.run_claim("dora", seeds=3)
    made = len(book)
    ledger.run_claim("lora-plus", seeds=3)
    assert {method for method, _, _ in book[made:]} == {"lora+"}, "LoRA's runs are those of the other claim"
    shared = [json.loads((tmp_path / f"{name}.tiny.json").read_text())["runs"] for name in ("dora", "lora-plus")]
    lora, again = ([record for record in runs if record["arm"] == "lora"] for runs in shared)
    assert lora == again
    book.clear()
    ledger.run_claim("rslora", seeds=3)
    assert "lora" in {method for method, _, _ in book}, "at another rank LoRA is another arm"
    monkeypatch.setattr(ledger, "environment", lambda _: {"torch": "another"})
    book.clear()
    ledger.run_claim("pissa", seeds=3)
    assert "lora" in {method for method, _, _ in book}, "on another machine a run gives other digits"


# What is committed


@pytest.mark.parametrize("claim", ledger.CLAIMS.values(), ids=ledger.CLAIMS)
def test_the_committed_runs_are_those_of_the_plan(claim):
    for scale, plan in claim.plans.items():
        records = ledger.stored(claim, scale)
        if not records:  # its rule stands before its runs do
            continue
        for arm, what in claim.arms.items():
            mine = [record for record in records if record["arm"] == arm]
            tried = {r["learning_rate"]: r["best_validation_loss"] for r in mine if r["seed"] == TUNING_SEED}
            best = min((rate for rate in tried if tried[rate] is not None), key=lambda rate: tried[rate])
            assert min(tried) < best < max(tried), f"{arm}: a neighbour of {best} was not tried: {tried}"
            reported = [record for record in mine if record["seed"] != TUNING_SEED]
            assert {record["learning_rate"] for record in reported} == {best}, f"{arm}: not at the rate that was chosen"
            assert [record["seed"] for record in reported] == list(range(plan.seeds)), f"{arm}: not the planned seeds"
            assert all(record["method"] == what.method and record["environment"]["torch"] for record in mine)


def test_the_readme_has_the_ledger():
    readme = (ledger.DATA.parent / "README.md").read_text(encoding="utf-8")
    assert ledger.table() in readme, (
        f"README's table should be what `python -m minilora claims` prints:\n{ledger.table()}"
    )
