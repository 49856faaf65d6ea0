"""What an update looks like: new singular vectors, shared directions, ranks, and the rules on them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilora.adapters.inject import apply_lora, lora_layers
from minilora.config import LoRAConfig
from minilora.experiments.claims import ledger, study
from minilora.experiments.claims.knobs import updates, updates_figures, updates_runs
from minilora.experiments.claims.study import BASES, Setting
from minilora.experiments.run import open_base
from minilora.linear4bit import float_linears
from minilora.text.batches import Batches
from minilora.train import evaluate_loss
from minilora.train_settings import NonFiniteError


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


@pytest.fixture
def few_rows(monkeypatch):
    """Four rows to validate on, two in a batch."""

    def load(name, base):
        data = study.load_dataset(name, base.tokenizer)
        held_out = Batches(data.validation.input_ids[:4], data.validation.labels[:4])
        return replace(data, validation=held_out, training={"batch_size": 2})

    monkeypatch.setattr(study, "dataset", load)


def setting_of(base, where: study.Study, arm: str, rate: float, seed: int = 0, **settings) -> Setting:
    plan = where.plans["tiny"]
    plan = replace(plan, steps=settings.pop("steps", 2), settings=plan.settings | {"stride": 6} | settings)
    return Setting(base, plan, where.arms[arm], rate, seed, progress=False)


# Singular vectors


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_vectors_are_those_of_the_svd(shape):
    torch.manual_seed(0)
    W = torch.randn(shape) @ torch.diag(torch.linspace(3, 0.5, shape[1]))
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose((U.T @ updates_runs.left(W)).abs(), torch.eye(24), atol=1e-3)
    assert torch.allclose((Vh[:5] @ updates_runs.right(W, 5).T).abs(), torch.eye(5), atol=1e-3)


def test_a_shuffled_update_keeps_its_singular_values_and_none_of_its_directions():
    torch.manual_seed(0)
    change = torch.randn(60, 3) @ torch.randn(3, 90)
    turned = updates_runs.shuffled(change, seed=0)
    assert torch.allclose(torch.linalg.svdvals(turned), torch.linalg.svdvals(change), atol=1e-3)
    for dim in (0, 1):  # rows are moved among themselves, and so are columns
        assert torch.allclose(turned.norm(dim=dim).sort().values, change.norm(dim=dim).sort().values, atol=1e-4)
    for side in (updates_runs.left, lambda W: updates_runs.right(W, 60).T):
        shared = (side(turned)[:, :3].T @ side(change)[:, :3]).square().sum() / 3
        assert shared < 0.3, f"{shared:.2f} of the directions are as they were"
    assert torch.equal(turned, updates_runs.shuffled(change, 0))
    assert not torch.equal(turned, updates_runs.shuffled(change, 1))
    signs = updates_runs.shuffled(torch.ones(20, 30), 0)
    assert set(signs.unique().tolist()) == {-1, 1}
    assert not signs.eq(signs[0]).all() and not signs.eq(signs[:, :1]).all(), "rows and columns get signs of their own"


def test_the_directions_of_A_and_of_the_product_are_told_apart(base):
    model = apply_lora(base.load(), LoRAConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    for _, layer in lora_layers(model):
        layer.lora_A.data = torch.eye(2, 192) * torch.tensor([[3.0], [1.0]])  # A is longest along the first axis,
        layer.lora_B.data = torch.eye(192, 2) * torch.tensor([1.0, 9.0])  # BA along the second: 3 and 9
    first = {of: {V[0].abs().argmax().item() for V in found} for of, found in updates_runs.vectors(model, 1).items()}
    assert first == {"A": {0}, "ΔW": {1}}


@pytest.fixture(scope="module")
def before(base):
    return updates_runs.Before(base, stride=6)


def test_a_new_vector_is_one_that_is_large_enough_and_near_none_of_the_old(before):
    """Rank 1 along the sum of all of W's left singular vectors, so far from each; and W's own directions."""
    assert {name.split(".")[2] for name in before.W} == {"0"}, "with a stride of six, one block of six"

    def mixed(W, size: float):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return size * S[0] * torch.outer(U.sum(1), Vh.sum(0)) / len(S)

    def raised(W):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return 10 * S[0] * torch.outer(U[:, 29], Vh[29])

    for what, change, low, high in (
        ("nothing", torch.zeros_like, 0, 0),
        ("W itself", lambda W: 3 * W, 0, 0),
        ("W's 30th direction, which comes first then and is still one of W's", raised, 0, 0),
        ("rank 1, small", lambda W: mixed(W, 0.01), 0, 0.2),
        ("rank 1, large", lambda W: mixed(W, 10), 1, 1.2),
    ):
        found = before.intruders({name: change(W) for name, W in before.W.items()})
        assert low <= found <= high, f"{what}: expected {low} to {high} new vectors, got {found}"


def test_the_count_follows_the_cosine():
    cosines = torch.tensor([[0.2, 0.45, 0.9, 1.0], [1.0, 1.0, 1.0, 0.49]])
    counts = [updates_runs.count(cosines, near) for near in (0.1, 0.3, 0.5, 0.95)]
    assert counts == [0, 0.5, 1.5, 2.0]


def test_the_rank_of_an_update_is_that_of_what_was_added(before):
    torch.manual_seed(0)
    S, changes = torch.tensor([3.0, 1, 1, 1, 1]), {}  # of 13 in ‖ΔW‖², three directions hold 11 and four 12
    for name, W in before.W.items():
        U, V = (torch.linalg.qr(torch.randn(side, 5)).Q for side in W.shape)
        changes[name] = U * S @ V.T
    assert before.rank(changes) == 4


def test_an_update_is_cut_to_the_best_of_rank_1(base, before, few_rows):
    torch.manual_seed(0)
    model = base.load()
    for linear in float_linears(model).values():
        linear.weight.data += 0.01 * torch.randn_like(linear.weight)
    whole = before.changes(model)
    with torch.no_grad():
        rows = study.dataset("dialect", base).validation
        loss = updates_runs.loss_at_rank_1(setting_of(base, updates.DIALECT, "full", 1e-3), model, rows)
    assert loss == pytest.approx(evaluate_loss(model, rows, 50, "float32"))
    for name, cut in before.changes(model).items():
        U, S, Vh = torch.linalg.svd(whole[name])
        assert torch.allclose(cut, S[0] * torch.outer(U[:, 0], Vh[0]), atol=1e-5), f"{name} is not cut to rank 1"


@pytest.mark.parametrize("arm", ["full", "r=8"])
def test_changes_are_what_training_did_to_w(base, before, few_rows, arm):
    model = setting_of(base, updates.DIALECT, arm, 1e-2).train(study.dataset("dialect", base)).model
    for name, change in before.changes(model).items():
        adapters = dict(lora_layers(model))
        W = adapters[name].base_layer.weight if adapters else float_linears(model)[name].weight - change
        assert torch.allclose(W, before.W[name], atol=1e-6) and change.abs().max() > 0
        assert not adapters or torch.linalg.matrix_rank(change) <= 8


# Runs


@pytest.mark.parametrize("arm", ["full", "r=1"])
def test_a_run_counts_along_the_way(base, few_rows, arm):
    record = updates_runs.new_vectors(setting_of(base, updates.DIALECT, arm, 1e-3, evaluations=2))
    assert [step for step, *_ in record["curve"]] == [0, 1, 2] and record["curve"][0][2] == 0
    assert [task for _, task, _ in record["curve"]] == pytest.approx(
        [loss for _, loss in record["validation_loss"]], abs=1e-4
    )
    scores = record["scores"]
    assert record["by_cosine"][2] == scores["intruders"] == record["curve"][-1][2]
    assert record["by_cosine"] == sorted(record["by_cosine"])
    (_, first), *_, (_, last) = record["validation_loss"]
    if arm == "full":  # cut to rank 1 it lies between the base and what was trained
        assert last < scores["loss at rank 1"] < first and scores["rank for 90 %"] > 5
    else:
        assert scores["loss at rank 1"] == pytest.approx(last, abs=1e-3) and scores["rank for 90 %"] == 1


def test_a_run_that_diverges_at_anothers_rate_is_counted_so_far(base, few_rows, monkeypatch):
    def diverge(self, data, watch=None, **training):
        if watch is not None:
            watch(base.load(), 1)
        raise NonFiniteError("the loss is nan")

    monkeypatch.setattr(Setting, "train", diverge)
    setting = setting_of(base, updates.DIALECT, "full, LoRA's rate", 1.0, steps=1)
    record = study.timed(updates.DIALECT, setting)
    assert record["scores"] == {"intruders": 0.0} and record["best_validation_loss"] is None
    assert study.timed(updates.DIALECT, replace(setting, seed=1000))["best_validation_loss"] is None
    drawn = {"full, LoRA's rate": {0: record}, "full": {0: {"by_cosine": [0] * 7}}}
    assert len(updates_figures.by_cosine("one of two diverged", drawn).axes[0].texts) == 1


def test_ranks_are_looked_at_along_one_run(base, few_rows, monkeypatch):
    """After n steps, a run that was made up has added n directions to each matrix, all of one size."""

    def train(self, data, watch, **training):
        model = base.load()
        linears = float_linears(model)
        for step in range(1, self.plan.steps + 1):
            for linear in linears.values():
                linear.weight.data[step, step] += 1
            if step in (1, 3, 10, 29, 30):
                watch(model, step)
        return SimpleNamespace(history=SimpleNamespace(best_validation_loss=1.0, validation_loss=[]))

    monkeypatch.setattr(Setting, "train", train)
    record = updates_runs.ranks_by_step(setting_of(base, updates.LENGTH, "full", 1e-3, steps=30))
    assert record["ranks"] == [[1, 1], [3, 3], [10, 9], [30, 27]], "90 % of as many directions"
    assert record["scores"] == {"rank for 90 %": 27, "possible": pytest.approx((5 * 192 + 2 * 64) / 7, abs=1e-3)}


def test_what_subspaces_share(base):
    """Rows of V and W: one direction in common of two, and the same two in another basis."""
    e = torch.eye(4)
    turned = torch.stack([e[0] + e[1], e[0] - e[1]]) / 2**0.5
    for V, W, size, expected in (
        (e[:2], e[1:3], 2, 0.5),
        (e[:2], e[1:3], 1, 0),
        (e[:2], turned, 2, 1),
        (e, turned, 1, 0.5),
    ):
        assert updates_runs.overlap([V], [W], size) == pytest.approx(expected, abs=1e-4), (V, W, size)


def test_three_adapters_of_three_seeds_are_compared(base, few_rows, monkeypatch):
    seen, train = [], Setting.train

    def spy(self, *arguments, **training):
        seen.append((self.arm.lora["r"], self.arm.lora["lora_alpha"], self.seed, self.rate))
        return train(self, *arguments, **training)

    monkeypatch.setattr(Setting, "train", spy)
    record = updates_runs.shared_directions(setting_of(base, updates.SHARED, "r=64", 1e-3, seed=1))
    assert seen == [(64, 16, 1, 1e-3), (64, 16, 101, 1e-3), (8, 16, 201, 1e-3)]
    assert {name: len(shares) for name, shares in record["shared"].items()} == {
        "seeds, A": 7, "seeds, ΔW": 7, "ranks, A": 4, "ranks, ΔW": 4,
    }  # fmt: skip
    assert all(0 <= share <= 1 for shares in record["shared"].values() for share in shares)
    assert record["chance"][0] == pytest.approx((6 / 192 + 1 / 512) / 7, abs=1e-4)
    assert record["scores"]["8, seeds"] == record["shared"]["seeds, A"][3]
    assert record["scores"]["top, ranks"] == record["shared"]["ranks, A"][0]


# Rules


def test_the_rules_say_what_their_words_say():
    def run(curve=(), **scores):
        return {"curve": curve, "scores": {name.replace("_", " "): value for name, value in scores.items()}}

    runs = {
        "r=8": run([[0, 6, 0], [1, 2.0, 3.0], [2, 1.0, 4.0]], intruders=4.0),
        "full": run([[0, 6, 0], [1, 1.0, 0.5], [2, 0.1, 2.5]], intruders=2.5, loss_at_rank_1=0.8),
        "full, LoRA's rate": run(intruders=6.5),
        "full, rate /3": run([[0, 6, 0], [1, 1.0, 0.2], [2, 0.3, 0.8]], loss_at_rank_1=0.4),
        "r=1": run(loss_at_rank_1=0.2),
        "r=64": {"scores": {"top, ranks": 0.6, "8, seeds": 0.3}},
    }
    runs["r=8"]["scores"]["intruders, shuffled"] = 3.5
    runs["full"]["ranks"] = [[10, 40.0], [30, 20.0], [100, 30.0], [300, 60.0]]
    expected = {
        "intruders-lora": 4.0, "intruders-full": 2.5, "intruders-loss": 3.5, "intruders-slow": 3.8,
        "intruders-rate": 2.5, "intruders-size": -0.5, "directions-ranks": 60, "directions-seeds": 30,
        "update-rank": 7.5, "update-rank-grows": 3, "rank-1-trained": 75, "rank-1-slow": 50,
    }  # fmt: skip
    assert list(expected) == [claim.name for claim in updates.CLAIMS]
    for name, number in expected.items():
        found = ledger.CLAIMS[name].rule.number(runs)
        assert found == pytest.approx(number), f"{name}: expected {number}, got {found}"


def test_an_arm_at_anothers_rate_has_that_rate_and_its_own_method():
    for where in (updates.DIALECT, updates.ORDERS):
        arms = where.arms
        assert (arms["full, LoRA's rate"].method, arms["full, LoRA's rate"].rate_of) == ("full", "r=8")
        assert (arms["r=8, full's rate"].lora, arms["r=8, full's rate"].rate_of) == (arms["r=8"].lora, "full")
        scale = [
            arm.lora["lora_alpha"] / arm.lora["r"] for name, arm in arms.items() if arm.lora and "alpha" not in name
        ]
        assert set(scale) == {2}


def test_figures_draw_what_runs_hold():
    record = {
        "curve": [[0, 6.0, 0.0], [1, 1.0, 2.0]], "by_cosine": [0, 0, 1, 2, 3, 4, 5],
        "scores": {"possible": 155.0}, "ranks": [[10, 60.0], [30, 40.0], [100, 38.0], [300, 45.0]],
        "shared": {"seeds, A": [0.5] * 7, "seeds, ΔW": [0.5] * 7, "ranks, A": [0.5] * 4, "ranks, ΔW": [0.5] * 4},
        "chance": [0.01] * 7,
    }  # fmt: skip
    arms = {arm: {0: record, 1: record} for arm in updates.CROSSED}
    (axes,) = updates_figures.by_cosine("", arms).axes
    assert list(axes.lines[0].get_ydata()) == record["by_cosine"] and len(axes.texts) == 4
    (axes,) = updates_figures.along_the_run("", {arm: arms[arm] for arm in ("r=8", "full")}).axes
    assert len(axes.lines) == 4 and {text.get_text() for text in axes.texts} == {"r=8", "full fine-tuning"}
    (axes,) = updates_figures.by_length("", arms).axes
    assert list(axes.lines[0].get_ydata()) == [60, 40, 38, 45]
    (axes,) = updates_figures.by_size("", {"r=64": {0: record}}).axes
    assert [len(line.get_ydata()) for line in axes.lines] == [7, 7, 4, 4, 7]
