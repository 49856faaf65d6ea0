"""The studies of merging: that weights come back, that what is measured is what is said, and the numbers by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from minilora.adapters.adapter import Adapter
from minilora.adapters.combine import concatenate, dare, elect, prune, ties, trim
from minilora.adapters.inject import lora_layers
from minilora.config import LoRAConfig
from minilora.experiments.claims.claim import Claim
from minilora.experiments.claims.together import merging
from minilora.experiments.claims.together import merging_numbers as numbers
from minilora.experiments.claims.together.merging_bench import Bench, Skill, change_of, likeness, merges_of
from minilora.experiments.claims.together.merging_runs import WEIGHTS, best_weight, merged, tuned_weights
from minilora.experiments.run import BASE
from minilora.model import GPT, GPTConfig
from minilora.text.rewordings import REWORDINGS, rewording
from minilora.text.tokenizer import open_tokenizer

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def bench():
    """A random model of two layers with the shipped tokenizer, and two tasks of a few rows."""
    tokenizer = open_tokenizer(BASE)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, **shape))
    tasks = {name: rewording(name, 4, 4) for name in ("past", "record")}
    skills = {name: Skill(task, task.validation[:2], task.validation[2:], task) for name, task in tasks.items()}
    return Bench(SimpleNamespace(base=SimpleNamespace(load=lambda: model, tokenizer=tokenizer, device="cpu")), skills)


def random_adapter(bench, seed, r=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: bench.linears[name].weight.shape for name in LAYERS}
    A = {name: torch.randn(r, in_, generator=generator) for name, (_, in_) in shapes.items()}
    B = {name: torch.randn(out, r, generator=generator) for name, (out, _) in shapes.items()}
    return Adapter(LoRAConfig(r, 3, target_modules=list(LAYERS)), A, B)


# The tasks


@pytest.mark.parametrize("name", REWORDINGS)
def test_a_task_takes_its_own_answers_and_nobody_elses(name):
    task = rewording(name, 300, 100)
    for example in task.validation:
        assert task.is_right(example, example.completion), example
        assert not task.is_right(example, example.completion.replace(" ", "  ", 2) + "x"), example
    answered = {example.prompt: example.completion for example in task.train}
    assert not set(answered) & {example.prompt for example in task.validation}
    strange = [each for each in task.validation if task.is_right(task.train[0], each.completion)]
    assert not strange, f"the answer to another question is taken for right: {strange[0]}"


def test_what_the_tasks_say():
    said = {name: rewording(name, 1, 1).train[0] for name in REWORDINGS}
    assert said["past"].prompt.startswith("Say it in the past: ") and " once " in said["past"].completion
    assert " not " in said["denial"].completion and said["question"].completion.endswith("?")
    assert said["record"].completion.count('": "') == 3 and said["table"].completion.count(" | ") == 2


# Merging


def test_all_pairs_triples_and_the_whole():
    assert [len(merges_of("abcdef", [size])) for size in (2, 3, 6)] == [15, 20, 1] and len(merges_of("abcdef")) == 36
    assert merges_of("ab") == [("a", "b")] and len(merges_of("abc")) == 4


def test_a_model_with_a_change_has_the_adapter_and_afterwards_its_own_weights(bench):
    adapter, rows = random_adapter(bench, 0), bench.rows(bench.skills["past"].reported)
    before = {name: weight.clone() for name, weight in bench.model.state_dict().items()}
    with torch.no_grad(), bench.changed(change_of(adapter), 0.5):
        got = bench.model(rows.input_ids)
        for name in LAYERS:
            wanted = before[f"{name}.weight"] + 0.5 * 1.5 * adapter.B[name] @ adapter.A[name]
            torch.testing.assert_close(bench.linears[name].weight, wanted)
    assert (got - bench.model(rows.input_ids)).abs().max() > 0.01
    assert all(torch.equal(weight, before[name]) for name, weight in bench.model.state_dict().items())
    assert not any(lora_layers(bench.model))


def test_a_loss_is_the_mean_of_the_tasks_with_the_change_in_place(bench):
    change = change_of(random_adapter(bench, 0))
    found = bench.tuning_loss(("past", "record"), change, 1.0)
    with bench.changed(change):
        losses = [bench.loss(bench.skills[name].tuning) for name in ("past", "record")]
    assert found == pytest.approx(sum(losses) / 2) != pytest.approx(bench.loss(bench.skills["past"].tuning))


def test_merged_changes_are_those_of_the_merged_adapters(bench):
    adapters = [random_adapter(bench, seed) for seed in range(3)]
    whole, ones = change_of(concatenate(adapters, [1] * 3)), [1.0] * 3
    expected = {"sum": whole, "linear": whole, "ties": change_of(ties(adapters, ones, 0.2, 24)[0])}
    expected["dare"] = change_of(dare(adapters, ones, 0.1, 24, seed=5)[0])
    for method, changes in expected.items():
        for name, change in merged(method, adapters, 5).items():
            torch.testing.assert_close(change, changes[name], msg=lambda text, m=method: f"{m}: {text}", **LOOSE)
    for name, change in merged("svd", adapters, 5).items():
        values = torch.linalg.svdvals(whole[name])
        assert torch.linalg.matrix_rank(change) == 2
        torch.testing.assert_close((change - whole[name]).norm(), values[2:].norm())


LOOSE = dict(atol=1e-4, rtol=1e-4)


def test_dare_with_signs_elects_among_what_was_kept_and_prune_sums_what_was_trimmed(bench):
    adapters, name = [random_adapter(bench, seed) for seed in range(2)], LAYERS[0]
    deltas = torch.stack([change_of(adapter)[name] for adapter in adapters])
    pruned = change_of(prune(adapters, [1, 1], 0.25, 16)[0])[name]
    torch.testing.assert_close(pruned, trim(deltas, 0.25).sum(0), **LOOSE)
    kept = torch.rand((2, 16, 16), generator=torch.Generator().manual_seed(3)) < 0.5
    got = change_of(dare(adapters, [1, 1], 0.5, 16, seed=3, signs=True)[0])[name]
    torch.testing.assert_close(got, elect(deltas * kept / 0.5), **LOOSE)


@pytest.mark.parametrize("best", [0.1, 0.25, 0.6, 1.7, 4.0])
def test_the_best_weight_is_found_wherever_it_lies(best):
    asked = []

    def loss_at(weight):
        asked.append(weight)
        return abs(math.log(weight / best))

    assert best_weight(loss_at) == (best, pytest.approx(0)) and len(asked) == len(set(asked))
    assert set(asked) <= set(WEIGHTS)


def test_a_weight_for_each_is_found_where_one_for_all_is_not(bench, monkeypatch):
    adapters, name = [random_adapter(bench, seed) for seed in range(2)], LAYERS[0]
    wanted = 0.25 * change_of(adapters[0])[name] + 1.4 * change_of(adapters[1])[name]
    monkeypatch.setattr(bench, "tuning_loss", lambda merge, changes, weight: (changes[name] - wanted).norm().item())
    changes, weights, loss = tuned_weights(bench, ("past", "record"), adapters)
    assert weights == [0.25, 1.4] and loss < 1e-5
    torch.testing.assert_close(changes[name], wanted)


# What may predict it


def test_likeness_of_adapters_by_hand(bench):
    one, other = random_adapter(bench, 0), random_adapter(bench, 1)
    twice = Adapter(one.config, one.A, {name: 2 * B for name, B in one.B.items()})
    same, apart = (likeness({"past": one, "record": two}, bench)["past + record"] for two in (twice, other))
    assert same["subspaces"] == pytest.approx(1) and same["cosine"] == pytest.approx(1)
    assert same["outputs"] == pytest.approx((2 + 0.5) / 2, abs=1e-4), "ΔW_j = 2 ΔW_i"
    assert 0 < apart["subspaces"] < 0.5 and abs(apart["cosine"]) < 0.5 and 0 < apart["inputs"] < 1


def test_moments_are_those_of_the_inputs_without_padding(bench):
    """The layer's inputs, row by row and each of its own length."""
    change, name = change_of(random_adapter(bench, 0)), LAYERS[0]
    found, inputs = bench.moments("past", change)[name], []
    hook = bench.linears[name].register_forward_pre_hook(lambda module, x: inputs.append(x[0][0].detach().double()))
    with torch.no_grad(), bench.changed(change):
        for example in bench.skills["past"].tuning:
            bench.model(bench.rows([example]).input_ids)
    hook.remove()
    x = torch.cat(inputs)
    torch.testing.assert_close(found[0], x.T @ x / len(x), **LOOSE)
    centred = x - x.mean(0)
    torch.testing.assert_close(found[1], centred.T @ centred / len(x), **LOOSE)


# Numbers


def tasks(**found):
    return {"tasks": {name: list(values) for name, values in found.items()}}


RECORD = {
    "base": {name: [5.0, 0.0] for name in "abc"},
    "alone": {"a": [1.0, 1.0], "b": [1.0, 0.5], "c": [3.0, 1.0]},
    "dropped": {"a": [2.0, 0.5], "b": [2.0, 0.5], "c": [3.0, 0.9]},
    "merges": {
        "sum": {
            "a + b": tasks(a=(2.0, 0.5), b=(3.0, 0.5)),
            "a + c": tasks(a=(1.0, 1.0), c=(3.0, 1.0)),
            "b + c": tasks(b=(5.0, 0.0), c=(5.0, 0.2)),
        }
    },
    "likeness": {"a + b": {"up": 0.2}, "a + c": {"up": 0.1}, "b + c": {"up": 0.3}},
}


def test_shares_are_of_the_score_alone():
    assert numbers.shares(RECORD, RECORD["merges"]["sum"])["a + b"] == [50, 100]
    assert numbers.kept(RECORD, "sum", 2) == pytest.approx((75 + 100 + 10) / 3)
    assert numbers.kept(RECORD, "sum", 2, min) == pytest.approx((50 + 100 + 0) / 3)
    assert numbers.kept_alone(RECORD) == pytest.approx((50 + 100 + 90) / 3)


def test_what_is_alike_and_disturbs_correlates_with_one():
    assert numbers.gains_left(RECORD, "sum") == pytest.approx({"a + b": 0.625, "a + c": 1.0, "b + c": 0.0})
    assert numbers.predicts(RECORD, "up") == 1
    other = RECORD | {"likeness": {pair: {"up": -found["up"]} for pair, found in RECORD["likeness"].items()}}
    assert numbers.predicts(other, "up") == -1


def test_the_best_merge_is_chosen_by_held_out_loss_and_held_against_the_union():
    made = {method: {"a + b": tasks(a=(1, 0.4), b=(1, 0.1)) | {"tuning_loss": 2.0}} for method in numbers.METHODS}
    made["ties"] = {"a + b": tasks(a=(1, 0.5), b=(1, 0.5)) | {"tuning_loss": 1.0}}
    made["svd"] = {"a + b": tasks(a=(1, 1.0), b=(1, 0.5)) | {"tuning_loss": 3.0}}
    unions = {"union": {"a + b": tasks(a=(1, 1.0), b=(1, 0.45))}}
    runs = {"apart": RECORD | {"merges": made}, "union": {"merges": unions}}
    assert numbers.merged_above_union(runs) == pytest.approx((50 + 100) / 2 - (100 + 90) / 2)


def test_the_figures_are_drawn():
    merges = {way: RECORD["merges"]["sum"] for way in ("sum", *numbers.METHODS)}
    likes = {pair: dict.fromkeys(("subspaces", "outputs"), found["up"]) for pair, found in RECORD["likeness"].items()}
    record = RECORD | {"merges": merges, "likeness": likes}
    runs = {"apart": {0: record, 1: record}, "gently": {0: record}}
    runs |= {"union": {0: {"merges": {"union": merges["sum"]}}}, "union short": {}}
    for draw in (merging.SIX.figure, *(claim.figure for claim in merging.CLAIMS if claim.figure)):
        assert len(draw("merging, tiny", runs).axes) == 1
    two = {"alone": {n: RECORD["alone"][n] for n in "ab"}, "merges": {"sum": {"a + b": merges["sum"]["a + b"]}}}
    assert len(merging.REAL.figure("merging-two, smollm2", {"apart": {0: two}, "union": {}}).axes[0].patches) == 2


@pytest.mark.parametrize("claim", merging.CLAIMS, ids=lambda claim: claim.name)
def test_every_claim_has_the_arms_of_its_rule(claim: Claim):
    for study in claim.studies:
        assert set(claim.rule.arms) <= set(study.arms)
