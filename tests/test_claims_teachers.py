"""The studies of teachers: what a student is given to learn from, and who teaches whom."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilora.experiments.claims.claim import Rule
from minilora.experiments.claims.goals import teachers, teachers_figures, teachers_runs
from minilora.experiments.claims.study import BASES, Plan, Setting
from minilora.experiments.run import open_base
from minilora.linear4bit import float_linears
from minilora.model import GPT, GPTConfig
from minilora.objectives import Distillation
from minilora.text.batches import Batches
from minilora.text.tasks import Example
from minilora.train_settings import CROSS_ENTROPY, IGNORE

SHAPE = GPTConfig(23, 16, 24, 2, 2, max_position_embeddings=32, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


def setting(base, arm: str, **changes) -> Setting:
    study = teachers.PIRATE
    return Setting(
        base, Plan("pirate", 5, 1, 1, study.plans["tiny"].settings), study.arms[arm], 0.01, 3, progress=False
    )


def small_data(count=12) -> SimpleNamespace:
    ids = torch.randint(3, 20, (count, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(8) < 4, IGNORE)
    some = [Example(f"Say {number}:", " Arr.") for number in range(count)]
    return SimpleNamespace(train=Batches(ids, labels), validation=Batches(ids, labels), floor=0.1,
                           task=SimpleNamespace(train=some))  # fmt: skip


def model(seed=0, dtype=torch.float64) -> GPT:
    torch.manual_seed(seed)
    return GPT(SHAPE).to(dtype)


def test_each_seed_learns_from_other_examples_and_all_of_a_size_from_the_same(base):
    data = small_data()
    some = replace(
        setting(base, "hard 20"), arm=replace(teachers.ARMS["hard 20"], settings={"examples": 5, "drawn": 0})
    )
    rows = [teachers_runs.rows_for(replace(some, seed=seed), data, None).input_ids.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert len({tuple(row) for row in rows[0]}) == 5, "each example once"


def test_what_the_teacher_writes_is_learned_as_it_was_drawn(base, monkeypatch):
    data, drawn = small_data(), []

    def sample(teacher, prompts, new, temperature, *how):
        assert temperature == 1.0, "the teacher's own distribution"
        drawn.extend([[40 + number, 7] for number in range(len(prompts))])
        return drawn

    monkeypatch.setattr(teachers_runs, "sample", sample)
    arm = replace(teachers.ARMS["written 50 x 20"], settings={"examples": 3, "drawn": 2})
    rows = teachers_runs.rows_for(replace(setting(base, "hard 20"), arm=arm), data, None)
    assert [row[row != IGNORE].tolist() for row in rows.labels] == drawn and len(rows) == 6
    asked = [base.tokenizer.decode(row[row != 7][:-1].tolist()) for row in rows.input_ids]
    assert len({text.partition(":")[0] for text in asked}) == 3, f"two answers to each of three questions: {asked}"


def test_the_teacher_is_fully_fine_tuned_on_all_examples(base, monkeypatch):
    seen, data, taught = [], small_data(), model()
    monkeypatch.setattr(teachers_runs, "dataset", lambda *_: data)
    monkeypatch.setattr(teachers_runs, "run", lambda what, **_: seen.append(what) or SimpleNamespace(model=taught))
    assert teachers_runs.teacher_of.__wrapped__("pirate", base) is taught
    assert (seen[0].method, seen[0].training.steps) == ("full", 150) and seen[0].dataset is data


def test_each_arm_has_its_labels_and_its_model(base, monkeypatch):
    """The losses stand in for models: on the task's answers 4, 2 and 3 nats after 1, 2 and 3 looks; KL is 9 nats."""
    seen, looks, data, taught, plain = [], iter([]), small_data(), model(), model(1)
    data.task.name = "pirate"

    def fit(setting, student, rows, objective, watch):
        seen.append((student, objective))
        for step in (1, 2, 3):
            watch(step)

    def loss_of(student, rows, objective=CROSS_ENTROPY):
        assert rows is data.validation
        seen.append((student, objective))
        return 9.0 if isinstance(objective, Distillation) else next(looks)

    stand_ins = {"fit": fit, "loss_of": loss_of, "teacher_of": lambda *_: taught}
    stand_ins |= {"rows_for": lambda *_: None, "cut_out": lambda *_: plain}
    stand_ins |= {"score_task": lambda student, *_: seen.append((student, None)) or SimpleNamespace(score=0.25)}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(teachers_runs, name, stand_in)
    monkeypatch.setattr(Setting, "dataset", lambda self: data)
    monkeypatch.setattr(type(base), "load", lambda self: plain)
    for arm, kind in (
        ("soft 50", Distillation),
        ("hard 1000", type(CROSS_ENTROPY)),
        ("written 50", type(CROSS_ENTROPY)),
    ):
        looks = iter([4.0, 2.0, 3.0])
        record = teachers_runs.measure(setting(base, arm))
        assert type(seen[0][1]) is kind and getattr(seen[0][1], "teacher", taught) is taught, arm
        assert {id(student) for student, _ in seen} == {id(plain)}, f"{arm} is trained, measured and scored"
        assert (record["best_validation_loss"], record["scores"]) == (2.0, {"task": 0.25, "KL": 9.0})
        assert record["validation_loss"] == [[1, 4.0], [2, 2.0], [3, 3.0]]
        seen.clear()
    for arm, measured in (("teacher", taught), ("cut out", plain), ("base", plain)):
        looks = iter([4.0])
        assert teachers_runs.measure(setting(base, arm))["best_validation_loss"] == 4
        assert {id(each) for each, _ in seen} == {id(measured)}, arm
        seen.clear()


def test_a_cut_of_full_rank_is_the_teacher_and_one_of_rank_0_the_base():
    """But for the embedding and the norms, which stay the base's."""
    plain, taught = model(), model()
    with torch.no_grad():
        for linear in float_linears(taught).values():
            linear.weight += 0.1 * torch.randn_like(linear.weight)
    folder = SimpleNamespace(load=lambda: model())
    ids = torch.arange(10).view(1, 10)
    gaps = {rank: [(teachers_runs.cut_out(folder, taught, rank)(ids) - other(ids)).abs().max().item()
                   for other in (plain, taught)] for rank in (0, 2, 16)}  # fmt: skip
    assert gaps[0][0] == 0 and gaps[16][1] < 1e-6 and min(gaps[2]) > 1e-3, gaps


def test_every_rule_can_hold_and_fail():
    def verdict(name: str, mine: dict, other: dict) -> str:
        rule: Rule = next(claim.rule for claim in teachers.CLAIMS if claim.name == name)
        arm, than = rule.arms
        return rule.decide({arm: dict.fromkeys(range(3), mine), than: dict.fromkeys(range(3), other)}).verdict

    def loss(value: float) -> dict:
        return {"best_validation_loss": value}

    def right(value: float) -> dict:
        return {"scores": {"task": value}}

    for name in ("teach-soft", "teach-written", "teach-many"):
        assert (verdict(name, loss(0.15), loss(0.15)), verdict(name, loss(0.17), loss(0.15))) == ("holds", "fails"), (
            name
        )
    assert (verdict("teach-hold", right(0.9), right(0.93)), verdict("teach-hold", right(0.8), right(0.93))) == (
        "holds",
        "fails",
    )
    assert (verdict("teach-cut", right(0.9), right(0.7)), verdict("teach-cut", right(0.9), right(0.85))) == (
        "holds",
        "fails",
    )


def test_the_figure_has_a_line_for_each_kind_of_label():
    runs = {name: {0: {"best_validation_loss": 0.2}, 1: {"best_validation_loss": 0.3}} for name in teachers.ARMS}
    runs["written 50 x 20"] = {0: {"best_validation_loss": 9.0}}  # another kind, which has no line
    (axes,) = teachers_figures.loss_over_examples("made up", runs).axes
    assert {height for each in axes.containers for height in each.lines[0].get_ydata()} == {0.25}
    lines = {container.get_label(): list(container.lines[0].get_xdata()) for container in axes.containers}
    assert lines == {
        "right answers of the data": [20, 50, 200, 1000],
        "answers that the teacher writes": [50, 1000],
        "the teacher's probabilities": [20, 50, 200, 1000],
    }
