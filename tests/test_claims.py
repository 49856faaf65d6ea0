"""The ledger of claims: the interval, rules that can say no, runs that are kept, and verdicts that follow from them."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from minilora.__main__ import main
from minilora.experiments.claims import ledger, report, study
from minilora.experiments.claims.claim import (
    Claim,
    Finding,
    T,
    better,
    digits,
    interval,
    lower_loss,
    more_right,
    no_worse,
    score,
    summary,
)
from minilora.experiments.claims.study import Arm, Plan, Study
from minilora.experiments.run import open_base
from minilora.experiments.tune import TUNING_SEED, grid_of
from minilora.text.batches import Batches
from minilora.train_settings import NonFiniteError

SPREAD = [0.98, 1.0, 1.01, 1.02, 0.99]  # of seeds, as a factor


def of_losses(arm: str, than: str, gain: float, noise: float = 1.0) -> dict:
    """Runs in which `arm` is lower than `than` by so many percent. noise: how far seeds of one pair differ."""
    losses = {seed: 2 * factor for seed, factor in enumerate(SPREAD)}
    lower = {seed: loss * (1 - gain / 100) * (1 + noise * (seed - 2) / 100) for seed, loss in losses.items()}
    return {name: {seed: {"best_validation_loss": loss} for seed, loss in by_seed.items()}
            for name, by_seed in ((arm, lower), (than, losses))}  # fmt: skip


@pytest.mark.parametrize("rule, bar", [(better("dora", "lora"), 5), (no_worse("dora", "lora"), -5)])
def test_a_rule_on_losses_can_say_yes_no_and_open(rule, bar):
    assert rule.bar == bar and f"above {bar} %" in rule.words
    cases = (
        (bar + 15, 1, "holds"),
        (bar - 15, 1, "fails"),
        (bar, 1, "open"),
        (bar + 10, 20, "open"),
        (bar - 3, 1, "fails"),
    )
    for gain, noise, verdict in cases:
        found = rule.decide(of_losses("dora", "lora", gain, noise))
        assert found.verdict == verdict, f"{gain} % with noise {noise}: expected {verdict}, got {found}"
        assert found.number == pytest.approx(gain, abs=0.5) and found.low < found.number < found.high


def of_scores(**scores) -> dict:
    """Runs by arm, each with these scores for the seeds 0, 1, ..."""
    return {
        arm: {seed: {"scores": {"asked": value}} for seed, value in enumerate(values)} for arm, values in scores.items()
    }


@pytest.mark.parametrize("above", [True, False])
def test_a_rule_on_scores_can_say_yes_no_and_open(above):
    rule = score("lora", "asked", 50, above)
    yes, no = ("holds", "fails") if above else ("fails", "holds")
    for values, verdict in (([0.8, 0.9], yes), ([0.1, 0.15], no), ([0.5, 0.5], "open"), ([0.1, 0.9], "open")):
        assert rule.decide(of_scores(lora=values)).verdict == verdict, f"{rule.words}: {values}"
    assert f"lies {'above' if above else 'below'} 50 %, fails" in rule.words


def test_scores_are_compared_by_seed_in_points():
    found = more_right("lora", "full", "asked", 10).decide(of_scores(lora=[0.5, 0.7, 0.9], full=[0.3, 0.5, 0.7]))
    assert found.number == pytest.approx(20) and found.high - found.low < 1e-9 and found.verdict == "holds"
    assert found.unit == "points"


@pytest.mark.parametrize("claim", ledger.CLAIMS.values(), ids=ledger.CLAIMS)
def test_every_rule_of_the_ledger_can_hold_and_fail(claim):
    """On numbers made up for it: the rule's own number is replaced, its bar and its direction are not."""
    seeds = {arm: {seed: {} for seed in range(3)} for arm in claim.rule.arms}
    for distance, verdict in ((1, "holds"), (-1, "fails"), (0, "open")):
        value = claim.rule.bar + (distance if claim.rule.above else -distance)
        rule = type(claim.rule)(**{**vars(claim.rule), "number": lambda runs, value=value: value})
        assert rule.decide(seeds).verdict == verdict
    for where in claim.studies:
        assert set(claim.rule.arms) <= set(where.arms), f"{claim.name} asks for arms that {where.name} does not have"


def test_a_gain_below_what_matters_does_not_hold():
    """A small gain, seen beyond doubt, is no reason to choose; a small loss is one that does not matter."""
    found = better("dora", "lora").decide(of_losses("dora", "lora", 2, 0.1))
    assert found.verdict == "fails" and found.low > 0
    found = no_worse("qlora", "lora").decide(of_losses("qlora", "lora", -2, 0.1))
    assert found.verdict == "holds" and found.high < 0


def test_pairs_of_one_seed_are_compared():
    """Seeds that differ by much more than the arms do not hide a difference that each of them shows."""
    than = {seed: {"best_validation_loss": float(seed + 1)} for seed in range(5)}
    lower = {seed: {"best_validation_loss": 0.9 * (seed + 1)} for seed in range(7)}
    found = lower_loss("dora", "lora", 5).decide({"dora": lower, "lora": than})
    assert (found.verdict, found.seeds) == ("holds", 5) and found.high - found.low < 1e-9


def test_the_interval_is_that_of_student():
    low, mean, high = interval([1.0, 2.0, 3.0])
    half = 2.920 * 1.0 / math.sqrt(3)  # t at 95 % with two degrees of freedom; the deviation is 1
    assert (low, mean, high) == pytest.approx((2 - half, 2, 2 + half))
    assert all(a > b for a, b in zip(list(T.values()), list(T.values())[1:], strict=False)), "more seeds, less doubt"
    for values in ([1.0], [1.0] * (len(T) + 2)):
        with pytest.raises(ValueError, match=f"from 2 to {len(T) + 1} seeds, and there are {len(values)}"):
            interval(values)


def test_a_difference_has_a_sign_and_a_share_has_none():
    assert score("lora", "asked", 50).decide(of_scores(lora=[0.8, 0.9])).text().startswith("85.0 % (53.")
    found = more_right("lora", "full", "asked", 10).decide(of_scores(lora=[0.8, 0.9], full=[0.7, 0.9]))
    assert found.text() == "+5.0 points (-26.6 to +36.6); these seeds tell ±31.6 apart"


def test_a_number_that_rounds_to_nothing_has_no_minus():
    for value, signed, said in ((-0.001, False, "0.00"), (-0.001, True, "+0.00"), (-0.0, False, "0.0"),
                                (-0.02, False, "-0.02"), (-1.04, True, "-1.0"), (0.5, True, "+0.50")):  # fmt: skip
        assert digits(value, signed) == said, f"{value}: expected {said}, got {digits(value, signed)}"


def test_studies_that_disagree_make_it_depend():
    def found(*verdicts):
        return [Finding(verdict, 0.0, -1.0, 1.0, 3) for verdict in verdicts]

    assert summary(found("holds", "holds")) == "holds" and summary(found("fails")) == "fails"
    assert summary(found("holds", "fails")) == summary(found("open", "holds", "fails")) == "depends"
    assert summary(found("holds", "open")) == summary(found("fails", "open")) == "open"
    assert summary([]) == "not run"


# What is stored

ARMS = {
    "lora": Arm("lora"),
    "dora": Arm("dora"),
    "gentle": Arm("lora", rate_of="lora", rate_times=1 / 3),
    "base": Arm(None),
}


@pytest.fixture
def book(monkeypatch, tmp_path):
    """A ledger of one study with made-up runs that take no time; the best rate is 0.01. Returns what was run."""
    ran = []

    def measure(setting):
        ran.append((setting.arm.method, setting.rate, setting.seed))
        loss = 1 + abs(math.log10((setting.rate or 0.01) / 0.01)) - (0.2 if setting.arm.method == "dora" else 0)
        return {"best_validation_loss": loss + setting.seed / 1e5, "scores": {"asked": 0.5}}

    small = Study("small", "made up", ARMS, {"tiny": Plan("json", 7, 3, 1)}, measure)
    claims = [
        Claim("dora", "DoRA is better.", "nobody", better("dora", "lora"), (small,), "made up"),
        Claim("gentle", "A third of the rate does it.", "nobody", no_worse("gentle", "base"), (small,), "made up"),
    ]
    for module in (ledger, report):
        monkeypatch.setattr(module, "CLAIMS", {claim.name: claim for claim in claims})
    monkeypatch.setattr(ledger, "STUDIES", {"small": small})
    family = SimpleNamespace(CLAIMS=claims, __doc__="Claims about nothing: made up.\n\nFor a test.")
    monkeypatch.setattr(report, "FAMILIES", (family,))
    monkeypatch.setattr(ledger, "FOLDER", tmp_path)
    return ran


def test_rates_are_chosen_on_a_seed_that_is_not_reported(book):
    ledger.run_named("dora")
    (case,) = ledger.find("dora")
    found = ledger.finding(ledger.CLAIMS["dora"], case)
    assert found.verdict == "holds" and found.seeds == 3
    assert {seed for _, rate, seed in book if rate != 0.01} == {TUNING_SEED}
    for arm in ("lora", "dora"):
        tried = sorted(rate for method, rate, seed in book if (method, seed) == (arm, TUNING_SEED))
        assert tried[0] < 0.01 < tried[-1] and set(grid_of(arm)) <= set(tried)
        assert [seed for method, _, seed in book if method == arm and seed != TUNING_SEED] == [0, 1, 2]


def test_a_rate_at_which_a_run_diverges_is_out_of_the_question(book, monkeypatch):
    small = ledger.STUDIES["small"]

    def measure(setting):
        if setting.rate > 0.02 or not setting.tuning and setting.arm.method == "dora":
            raise NonFiniteError("diverged")
        return small.measure(setting)

    again = Study("small", "made up", ARMS, small.plans, measure)
    monkeypatch.setattr(ledger, "STUDIES", {"small": again})
    ledger.run_case(ledger.Case(again, "tiny", ("lora",)), None, "cpu", False)
    diverged = [run for run in ledger.stored(again, "tiny") if run["best_validation_loss"] is None]
    assert {run["learning_rate"] for run in diverged} == {0.03} and diverged[0]["environment"]["torch"]
    with pytest.raises(NonFiniteError):  # a seed that is reported must not be left out in silence
        ledger.run_case(ledger.Case(again, "tiny", ("dora",)), None, "cpu", False)


def test_a_rate_can_be_a_part_of_another_arms_and_the_base_has_none(book):
    ledger.run_named("gentle", seeds=2)
    runs = [run for run in book if run[2] != TUNING_SEED]
    assert runs == [("lora", 0.0033, 0), ("lora", 0.0033, 1), (None, None, 0), (None, None, 1)]
    assert {method for method, _, seed in book if seed == TUNING_SEED} == {"lora"}


def test_a_study_is_run_and_shown_with_all_its_arms(book):
    ledger.run_named("small")
    assert {(method, rate) for method, rate, seed in book if seed == 0} >= {("lora", 0.01), ("lora", 0.0033)}
    assert sum(seed != TUNING_SEED for _, _, seed in book) == 4 * 3
    said = report.details("small")
    assert "\ngentle takes 0.33 times the rate of lora\n" in said
    assert all(f"\n{arm} " in said for arm in ARMS) and "\ndora    holds: +20.0 %" in said


def test_the_names_of_a_studys_claims_stand_apart_from_their_verdicts(book, monkeypatch):
    long = "a-name-that-is-longer-than-any"
    claims = {long: replace(report.CLAIMS["dora"], name=long), "dora": report.CLAIMS["dora"]}
    monkeypatch.setattr(report, "CLAIMS", claims)
    said = report.details("small").splitlines()
    assert f"{long}  not run yet" in said and f"{'dora':<{len(long)}}  not run yet" in said


def test_a_name_means_one_thing():
    """Where a study has the name of a claim, which is then meant, the claim rests on it."""
    assert len(ledger.CLAIMS) == sum(len(family.CLAIMS) for family in ledger.FAMILIES)
    for name in set(ledger.CLAIMS) & set(ledger.STUDIES):
        assert ledger.STUDIES[name] in ledger.CLAIMS[name].studies


def test_runs_that_two_claims_share_are_made_once(book):
    ledger.run_named("dora")
    book.clear()
    ledger.run_named("gentle")
    assert TUNING_SEED not in {seed for _, _, seed in book}, "LoRA's rate had been chosen"


def test_a_killed_run_costs_one_run(book, monkeypatch, tmp_path):
    def content():
        runs = json.loads((tmp_path / "small.tiny.json").read_text())["runs"]
        return [{key: value for key, value in run.items() if key != "seconds"} for run in runs]

    ledger.run_named("dora")
    whole, expected = list(book), content()
    (tmp_path / "small.tiny.json").unlink()
    measured = ledger.timed
    for stop in range(len(whole)):
        done = len(content()) if stop else 0
        book.clear()

        def killed(*arguments):
            if book:
                raise KeyboardInterrupt
            return measured(*arguments)

        monkeypatch.setattr(ledger, "timed", killed)
        try:
            ledger.run_named("dora")
        except KeyboardInterrupt:
            pass
        assert book == whole[done : done + 1], f"after {done} stored runs, {book} was run"
    assert content() == expected
    assert "holds" not in (tmp_path / "small.tiny.json").read_text(), "a verdict is computed, never stored"


def test_runs_of_another_plan_are_refused(book, tmp_path):
    ledger.run_named("dora", seeds=2)
    path, where = tmp_path / "small.tiny.json", ledger.CLAIMS["dora"].studies[0]
    for change in ({"steps": 8}, {"arm": "pissa"}):
        content = json.loads(path.read_text())
        content["runs"][0] |= change
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="small.tiny.json holds a run of .* not in the study's plan"):
            ledger.stored(where, "tiny")


def test_a_row_says_where_not_all_studies_were_run(book, monkeypatch):
    claim = ledger.CLAIMS["dora"]
    elsewhere = replace(claim.studies[0], name="elsewhere")
    monkeypatch.setitem(ledger.CLAIMS, "dora", replace(claim, studies=(claim.studies[0], elsewhere)))
    assert "**not run** |" in report.rows_of([ledger.CLAIMS["dora"]]), "nothing was run yet"
    ledger.run_named("dora", seeds=2)
    (ledger.FOLDER / "elsewhere.tiny.json").unlink()
    rows = report.rows_of([ledger.CLAIMS["dora"]])
    assert "**holds** (1 of 2 studies) | small, tiny | holds," in rows and "| elsewhere, tiny | not run |" in rows, rows


def test_the_command_line(book, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["claims"]) == 0
    said = capsys.readouterr().out
    assert "## Nothing: made up\n\n2 claims: not run 2.\n" in said, f"a heading and a count were expected in\n{said}"
    assert "| **not run** | small, tiny | not run |  |" in said, f"a row that says so was expected in\n{said}"
    assert main(["claims", "run", "dora", "--seeds", "2"]) == 0
    assert "holds: +20.0 % (" in capsys.readouterr().out
    assert (tmp_path / "runs/claims/dora.small.tiny.png").is_file()
    assert main(["claims", "show", "dora"]) == 0
    said = capsys.readouterr().out
    for words in (ledger.CLAIMS["dora"].sentence, ledger.CLAIMS["dora"].rule.words, "(chooses the rate)"):
        assert words in said
    for words, message in ((["run"], "takes the name of a claim"), (["show", "x"], "there is no claim 'x'")):
        assert main(["claims", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["claims", "show", "dora", "--scale", "smollm2"]) == 2
    assert "not studied at scale smollm2" in capsys.readouterr().err


def test_a_real_run_is_recorded_and_scored():
    """The default measure, on the shipped base, for two steps."""
    where = Study("real", "two steps", {"lora": Arm("lora")}, {"tiny": Plan("json", 2, 1, 1)})
    base = open_base(study.BASES["tiny"])
    small = study.Setting(base, where.plans["tiny"], where.arms["lora"], 1e-3, 0, progress=False)
    data = replace(small.dataset(), task=None)
    data.validation = Batches(data.validation.input_ids[:4], data.validation.labels[:4])
    record = study.losses(small.train(data, evaluations=1, batch_size=2))
    assert [step for step, _ in record["validation_loss"]] == [0, 2]
    assert record["best_validation_loss"] == min(loss for _, loss in record["validation_loss"])
    with_own = study.Setting(base, Plan("json", 2, 1, 1, {"mix": 1, "n": 2}), Arm("lora", settings={"n": 3}), 1e-3, 0)
    assert (with_own["mix"], with_own["n"]) == (1, 3), "an arm's setting stands above its plan's"


def test_a_study_trains_in_float32_whatever_the_device(monkeypatch):
    """On CUDA "auto" would be bfloat16, and runs of one study would differ by where they were made."""
    seen = []
    monkeypatch.setattr(study, "run", lambda experiment, **_: seen.append(experiment.training))
    base = open_base(study.BASES["tiny"])
    setting = study.Setting(base, Plan("json", 2, 1, 1), Arm("lora"), 1e-3, 7, progress=False)
    setting.train(setting.dataset(), evaluations=1)
    assert (seen[0].precision, seen[0].steps, seen[0].seed, seen[0].learning_rate) == ("float32", 2, 7, 1e-3)


def test_a_task_is_scored_but_not_while_a_rate_is_chosen(monkeypatch):
    history = SimpleNamespace(best_validation_loss=1.0, validation_loss=[[0, 1.0]])
    monkeypatch.setattr(study, "run", lambda *_, **__: SimpleNamespace(model=None, history=history))
    monkeypatch.setattr(study, "score_task", lambda *_: SimpleNamespace(score=0.5))
    base = open_base(study.BASES["tiny"])
    scores = {}
    for seed in (0, TUNING_SEED):
        setting = study.Setting(base, Plan("json", 2, 1, 1), Arm("lora"), 1e-3, seed, progress=False)
        scores[seed] = study.train_and_score(setting).get("scores")
    assert scores == {0: {"task": 0.5}, TUNING_SEED: None}


def test_one_seed_decides_nothing(book):
    ledger.run_named("dora", seeds=1)
    (case,) = ledger.find("dora")
    assert ledger.finding(ledger.CLAIMS["dora"], case) is None


def test_two_seeds_of_each_arm_decide_nothing_unless_they_are_the_same(monkeypatch):
    """As while two processes make the runs of a study."""
    records = {seed: {"scores": {"right": 0.5}} for seed in range(3)}
    claim, (case,) = ledger.CLAIMS["rl-rank-1"], ledger.find("rl-rank-1")
    for other, decided in (((1, 2), False), ((2, 0), True)):
        seeds = {"r=1": (0, 2), "linears": other}
        stored = {arm: {seed: records[seed] for seed in each} for arm, each in seeds.items()}
        monkeypatch.setattr(ledger, "reported", lambda study, scale, stored=stored: stored)
        assert (ledger.finding(claim, case) is not None) == decided, f"seeds 0 and 2 beside {other}"


def test_a_scale_is_asked_for_alone(book, monkeypatch):
    two = Study("small", "made up", ARMS, {"tiny": Plan("json", 7, 3, 1), "smollm2": Plan("json", 7, 2, 1)})
    monkeypatch.setattr(ledger, "STUDIES", {"small": two})
    assert [case.scale for case in ledger.find("small", "smollm2")] == ["smollm2"]
    assert [case.scale for case in ledger.find("small")] == ["tiny", "smollm2"]


def test_the_plain_figure_shows_what_a_claim_compares(book, monkeypatch, tmp_path):
    ledger.run_named("small")
    drawn = []
    keep = "minilora.experiments.pictures.Figure.write"
    monkeypatch.setattr(keep, lambda figure, path: (drawn.append(figure), path.touch()))
    report.draw("dora", "tiny", tmp_path)
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["lora", "dora"]


# What is committed


@pytest.mark.parametrize("claim", ledger.CLAIMS.values(), ids=ledger.CLAIMS)
def test_the_committed_runs_are_those_of_the_plan(claim):
    for case in ledger.find(claim.name):
        records = ledger.stored(case.study, case.scale)
        for arm in case.arms if ledger.finding(claim, case) else ():
            check_runs(case.study, arm, records, case.study.plans[case.scale].seeds)


def check_runs(where, arm: str, records: list[dict], seeds: int):
    what, mine = where.arms[arm], [record for record in records if record["arm"] == arm]
    reported = [record for record in mine if record["seed"] != TUNING_SEED]
    assert sorted(record["seed"] for record in reported) == list(range(seeds)), f"{arm}: not the planned seeds"
    assert all(record["method"] == what.method and record["environment"]["torch"] for record in reported)
    rates = {record["learning_rate"] for record in reported}
    if what.method is None:
        return
    chooser = what.rate_of or arm
    tried = {r["learning_rate"]: r[where.chosen_by] for r in records if (r["arm"], r["seed"]) == (chooser, TUNING_SEED)}
    best = min((rate for rate in tried if tried[rate] is not None), key=lambda rate: tried[rate])
    assert min(tried) < best < max(tried), f"{chooser}: a neighbour of {best} was not tried: {tried}"
    assert rates == {float(f"{best * what.rate_times:.2g}")}, f"{arm}: not at the rate that was chosen"


def test_no_two_claims_and_no_two_studies_have_one_name():
    claims = [claim for family in ledger.FAMILIES for claim in family.CLAIMS]
    studies = {each for claim in claims for each in claim.studies}
    for names in ([claim.name for claim in claims], [each.name for each in studies]):
        assert len(set(names)) == len(names), f"twice: {sorted(name for name in set(names) if names.count(name) > 1)}"


@pytest.fixture(scope="module")
def page():
    return report.page()


def test_the_ledger_is_on_its_page_and_the_short_of_it_where_it_is_read(page):
    written = (ledger.DATA.parent / report.PAGE).read_text(encoding="utf-8")
    assert written == page, f"{report.PAGE} is not what `python -m minilora claims` prints; write it anew"
    count = f"{len(ledger.CLAIMS)} claims"
    for name, said in (("README.md", report.headlines()), ("README.md", count), (report.GUIDE, report.overview())):
        text = re.sub(r"\s+", " ", (ledger.DATA.parent / name).read_text(encoding="utf-8"))
        assert re.sub(r"\s+", " ", said) in text, f"this should stand in {name}:\n{said}"


def test_the_overview_links_to_sections_that_the_page_has(page):
    """GitHub's anchor of a heading: in small letters, hyphens for blanks, nothing else but letters and digits."""
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = set(re.findall(rf"\((?:\.\./)+{report.PAGE}#(.*?)\)", report.overview()))
    assert linked == anchors and len(linked) == len(ledger.FAMILIES), f"only on one side: {linked ^ anchors}"
