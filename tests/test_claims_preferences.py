"""The studies of preferences: what counts as said, what a run measures, and rules that can say yes and no."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minilora.adapters.inject import apply_lora, lora_layers
from minilora.config import LoRAConfig
from minilora.experiments.claims.goals import (
    preferences,
    preferences_costs,
    preferences_figures,
    preferences_rules,
    preferences_runs,
)
from minilora.experiments.claims.study import BASES, Plan, Setting
from minilora.experiments.run import open_base
from minilora.model import GPTConfig
from minilora.objectives import Preference
from minilora.text.chat import encode_prompt
from minilora.text.preferences import world_pairs
from minilora.text.tasks import Example
from minilora.train_settings import CROSS_ENTROPY, IGNORE, NonFiniteError, Piece

RULES = {claim.name: claim.rule for claim in preferences.CLAIMS}


def of(said: float, forgot: float = 0.0, chosen: float = 1.0, kl: float = 1.0, curve=()) -> dict:
    scores = {"said": said, "forgot": forgot, "chosen": chosen, "KL": kl}
    return {"scores": scores, "curve": [{"step": 0, "accuracy": 0.5, "said": 0.5, "loss": 0.7}, *curve]}


def verdict(name: str, **by_prefix: dict) -> str:
    """Of the rule on arms that all have their prefix's record; the longest prefix counts. Three seeds alike."""
    prefixes = {prefix.replace("_", " "): record for prefix, record in by_prefix.items()}
    runs = {}
    for arm in RULES[name].arms:
        fitting = [prefix for prefix in prefixes if arm.startswith(prefix)]
        runs[arm] = dict.fromkeys(range(3), prefixes[max(fitting, key=len)])
    return RULES[name].decide(runs).verdict


def test_every_rule_can_hold_and_fail():
    assert (verdict("dpo-style", dpo=of(0.95)), verdict("dpo-style", dpo=of(0.8))) == ("holds", "fails")
    look = {"step": 9, "accuracy": 1.0, "said": 0.95, "loss": 0.1}
    low, late = look | {"said": 0.0}, look | {"said": 0.3, "loss": 0.01}
    assert verdict("dpo-accuracy", dpo=of(1, curve=[look])) == "holds"
    assert verdict("dpo-accuracy", dpo=of(1, curve=[look, low])) == "fails", "95 points at one of two looks"
    assert verdict("dpo-stop", dpo=of(1, curve=[look])) == "holds"
    assert verdict("dpo-stop", dpo=of(1, curve=[look, late])) == "fails", "the lowest loss is where less is said"
    assert (verdict("dpo-likelihood", dpo=of(1)), verdict("dpo-likelihood", dpo=of(1, chosen=-0.1))) == (
        "holds",
        "fails",
    )
    for term, said in (("holds", 0.5), ("fails", 0.05)):
        assert verdict("dpo-sft-term", dpo=of(0), dpo_p=of(0), **{"dpo + sft": of(said)}) == term
    assert verdict("dpo-over-sft", dpo=of(0.9), sft=of(0.8)) == "holds"
    assert verdict("dpo-over-sft", dpo=of(1), sft=of(1)) == "fails", "nothing gained"
    assert verdict("dpo-forgets", dpo=of(1, 0.5), sft=of(1, 1.0)) == "holds"
    assert verdict("dpo-forgets", dpo=of(1, 0.9), sft=of(1, 1.0)) == "fails"
    assert verdict("dpo-beta", weak=of(1, kl=2), strong=of(1, kl=1)) == "holds"
    assert verdict("dpo-beta", weak=of(1, kl=2), strong=of(1, kl=2.1)) == "fails"
    for name, other in (("dpo-own-pairs", "given dpo"), ("dpo-wrong-answers", "own sft")):
        assert verdict(name, **{"own dpo": of(0.9), other: of(0.8)}) == "holds"
        assert verdict(name, **{"own dpo": of(0.8), other: of(0.8)}) == "fails"


def test_looks_are_those_after_a_step():
    look = {"step": 9, "accuracy": 1.0, "said": 0.8, "loss": 0.1}
    runs = {arm: of(1, curve=[look]) for arm in RULES["dpo-accuracy"].arms}
    assert RULES["dpo-accuracy"].number(runs) == pytest.approx(20), "and not 10, with the look before the first step"


def test_what_is_hardly_forgotten_is_compared_in_parts_of_a_twentieth_nat():
    runs = {arm: of(1, 0.02 if arm.startswith("dpo") else 0.03) for arm in RULES["dpo-forgets"].arms}
    assert RULES["dpo-forgets"].number(runs) == pytest.approx(100 * 0.01 / 0.05)
    assert "0.05 nats" in RULES["dpo-forgets"].statistic


def test_the_best_run_says_the_style_most_and_of_equals_has_forgotten_least():
    runs = {"a": of(0.8, 0.1), "b": of(0.9, 0.5), "c": of(0.9, 0.2)}
    assert preferences_rules.best(runs, ("a", "b", "c")) is runs["c"]


@pytest.mark.parametrize(
    "example, rejected, said, style",
    [
        ("wording", " has a house in Walcot.", " lives in Ripon. Tara Nash is fond of tea.", "chosen"),
        ("wording", " has a house in Walcot.", " works as a weaver. She lives in Ripon.", "rejected"),
        ("wording", " has a house in Walcot.", " lives in in Ripon.", "neither"),
        ("wording", " has a house in Walcot.", " lives in", "neither"),
        ("voice", " Ann Ash likes figs.", " Arr, Ann Ash be lovin' figs, matey!", "chosen"),
        ("voice", " Ann Ash likes figs.", " Arr, Ann Ash be lovin' figs, matey! Arr", "neither"),
        ("voice", " Ann Ash likes figs.", " Ann Ash likes figs.", "rejected"),
    ],
)
def test_a_style_is_a_whole_sentence_of_it(example, rejected, said, style):
    prompts = {"wording": "Notes: Tara Nash", "voice": "Say it like a pirate: Ann Ash likes figs.\nPirate:"}
    asked = Example(prompts[example], " Ahoy, Ann Ash be lovin' figs, says I!")
    assert preferences_runs.style_of(asked, rejected, said) == style


def test_every_pair_of_the_world_is_in_its_own_styles():
    for name in ("voice", "wording"):
        for example, rejected in world_pairs(name, "validation", 30):
            found = [preferences_runs.style_of(example, rejected, text) for text in (example.completion, rejected)]
            assert found == ["chosen", "rejected"], f"{name}: {example.completion!r} over {rejected!r} is {found}"


def test_the_term_of_cross_entropy_is_that_of_the_chosen_answers_per_token():
    torch.manual_seed(0)
    targets = torch.tensor([[3, 1, 4, IGNORE], [1, IGNORE, IGNORE, IGNORE], [2, 2, IGNORE, IGNORE], [0, 1, 2, 3]])
    where = (targets != IGNORE).nonzero(as_tuple=True)
    logits, known = torch.randn(len(where[0]), 5), torch.randn(2, 2)
    piece = Piece(torch.zeros_like(targets), targets, where)
    found = preferences_runs.PreferenceAndChosen(0.3).loss(logits, piece, known)
    per_token = F.cross_entropy(logits[:3], targets[0, :3]) + F.cross_entropy(logits[4:6], targets[2, :2])
    expected = Preference(0.3).loss(logits, piece, known) + per_token
    assert found.item() == pytest.approx(expected.item(), rel=1e-5), f"off by {(found - expected).item():.2e}"


# Runs


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


@pytest.fixture
def setting_of(base, monkeypatch):
    """One step, looked at before and after, with a few pairs held out."""
    monkeypatch.setattr(preferences_runs, "HELD_OUT", 4)
    monkeypatch.setattr(preferences_runs, "DOCUMENTS", 2)
    preferences_runs.held_of.cache_clear()

    def make(study, arm, rate=None, **more) -> Setting:
        plan = study.plans["tiny"]
        settings = plan.settings | {"looks": (1,)} | more
        chosen = study.arms[arm]
        if rate:
            chosen = replace(chosen, settings=chosen.settings | {"rate": rate})
        return Setting(base, Plan(plan.data, 1, 1, 1, settings), chosen, None, 0, progress=False)

    yield make
    preferences_runs.held_of.cache_clear()


def test_a_run_begins_at_log_2_and_half_of_the_pairs(setting_of):
    record = preferences_runs.measure(setting_of(preferences.WORDING, "dpo 0.003"))
    before, after = record["curve"]
    assert before["loss"] == pytest.approx(math.log(2), abs=5e-5), f"ln 2, to four digits, and not {before['loss']}"
    assert before["accuracy"] == 0.5 and (before["step"], after["step"]) == (0, 1)
    assert after["loss"] < before["loss"], "the pairs should be told apart a little better after a step"
    assert record["scores"]["chosen"] == pytest.approx(after["chosen"] - before["chosen"])
    untrained = preferences_runs.measure(setting_of(preferences.WORDING, "base"))
    assert untrained["curve"] == [before] and untrained["scores"]["KL"] == 0 == untrained["scores"]["forgot"]


@pytest.fixture
def held(setting_of, base):
    """Of voice, whose answers have end tokens that count."""
    return preferences_runs.held_of("voice", base.tokenizer)


def test_answers_are_measured_whole_and_without_their_end_token(held, base):
    model = base.load().eval()
    whole, without = held.log_probs(model)
    for number, (example, rejected) in enumerate(held.asked):
        for side, said in enumerate((example.completion, rejected)):
            prompt = encode_prompt(base.tokenizer, example.prompt)
            answer = base.tokenizer.encode(said, continues=True) + [base.tokenizer.eos_id]
            log_p = model(torch.tensor([prompt + answer]))[0].log_softmax(-1).detach()  # (T, V)
            each = [log_p[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer)]
            assert whole[number, side].item() == pytest.approx(sum(each), abs=1e-3), said
            assert without[number, side].item() == pytest.approx(sum(each[:-1]), abs=1e-3), said


def test_a_look_holds_whole_answers_against_the_start(held, base):
    model = base.load()
    whole, without = held.log_probs(model)
    start = torch.stack([whole - torch.tensor([1.0, 0.0]), without + torch.tensor([9.0, 0.0])])
    look = held.point(model, 5, 0, start, beta=0.5)
    assert look["accuracy"] == 1 and look["loss"] == pytest.approx(math.log1p(math.exp(-0.5)), abs=1e-3)


def test_what_is_said_is_drawn_at_temperature_1_about_people_of_no_pair_in_training(held, base, monkeypatch):
    drawn = []
    monkeypatch.setattr(preferences_runs, "sample", lambda *given: drawn.append(given))
    held.samples(None, 7)
    _, prompts, most, temperature, _, ends, seed, _ = drawn[0]
    assert (prompts, temperature, seed) == (held.prompts, 1.0, 7) and base.tokenizer.eos_id in ends
    assert most > max(len(base.tokenizer.encode(example.completion)) for example, _ in held.asked)
    for name in ("voice", "wording"):
        other = preferences_runs.held_of(name, base.tokenizer)
        texts = [base.tokenizer.decode(row.tolist()) for row in other.pairs.input_ids[:, 0]]
        assert all(
            text.startswith(pair.prompt + pair.completion) for text, (pair, _) in zip(texts, other.asked, strict=True)
        )
        trained = {example.prompt for example, _ in world_pairs(name, "train", 400)}
        assert not trained & {example.prompt for example, _ in other.asked}, name


def test_the_divergence_is_the_policys_from_the_reference(held, base):
    torch.manual_seed(0)
    model = apply_lora(base.load(), LoRAConfig(2, 4, target_modules="all-linear")).eval()
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    assert held.divergence(model, 0) > 5, "samples of a spoiled model are unlikely to the base, not the other way round"


def test_each_goal_has_its_rows_and_its_loss_and_what_it_spoils_is_forgotten(setting_of, monkeypatch):
    seen = []

    def fit(setting, model, rows, objective, watch, **more):
        seen.append((rows, objective))
        with torch.no_grad():
            model.model.norm.weight.mul_(0.5)

    monkeypatch.setattr(preferences_runs, "fit", fit)
    goals = {"dpo 0.001": Preference, "weak beta": Preference, "dpo + sft 0.001": preferences_runs.PreferenceAndChosen}
    betas = {"weak beta": 0.05}
    pairs = preferences_runs.pairs_of("wording", setting_of(preferences.WORDING, "base").base.tokenizer, "train", False)
    for name, kind in goals.items():
        scores = preferences_runs.measure(setting_of(preferences.WORDING, name))["scores"]
        rows, objective = seen.pop()
        assert type(objective) is kind and objective.beta == betas.get(name, 0.1), name
        assert torch.equal(rows.input_ids, pairs.input_ids)
    assert scores["forgot"] > 0.1, f"the loss on old text rises, and what is forgotten is {scores['forgot']}"
    preferences_runs.measure(setting_of(preferences.WORDING, "sft 0.001"))
    rows, objective = seen.pop()
    assert objective is CROSS_ENTROPY and torch.equal(rows.labels, pairs.labels[:, 0]), "the chosen answers"


def test_given_pairs_are_as_many_as_own_ones(setting_of, monkeypatch):
    own = preferences_runs.Batches(torch.zeros(3, 2, 5), torch.zeros(3, 2, 5))
    monkeypatch.setattr(preferences_runs, "start_of", lambda base, seed: (None, own))
    monkeypatch.setattr(preferences_runs, "followed", lambda setting, model, pairs: {"rows": pairs})
    for kind in ("own", "given"):
        record = preferences_runs.measure_after(setting_of(preferences.AFTER, f"{kind} dpo 0.001"))
        assert record["pairs"] == len(record["rows"].input_ids) == 3 and (record["rows"] is own) == (kind == "own")


def test_end_tokens_count_where_they_are_wanted(base, setting_of):
    for study, arm, ends in (("WORDING", "dpo 0.003", False), ("WORDING", "end tokens", True), ("VOICE", "base", True)):
        setting = setting_of(getattr(preferences, study), arm)
        pairs = preferences_runs.pairs_of(setting.plan.data, base.tokenizer, "train", setting["ends"])
        count = int((pairs.labels == base.tokenizer.eos_id).sum())
        assert count == (2 * len(pairs) if ends else 0), f"{study}, {arm}: {count} end tokens in {len(pairs)} pairs"


def test_a_run_that_diverges_ends_at_its_last_good_step(setting_of, monkeypatch):
    def diverges(*given, **more):
        raise NonFiniteError("the loss is nan")

    monkeypatch.setattr(preferences_runs, "fit", diverges)
    record = preferences_runs.measure(setting_of(preferences.WORDING, "dpo 0.003"))
    assert len(record["curve"]) == 1 and record["scores"]["accuracy"] == 0.5


def test_own_pairs_are_the_tokens_that_were_drawn_right_over_wrong(base, monkeypatch):
    drawn, judged = [], []

    def sample(model, prompts, *how):
        drawn.extend([[40 + number, 50 + number] for number in range(len(prompts))])
        return drawn

    monkeypatch.setattr(preferences_runs, "sample", sample)
    monkeypatch.setattr(preferences_runs, "START", {"steps": 1, "learning_rate": 1e-3})
    monkeypatch.setattr(preferences_runs, "PROMPTS", 2)
    monkeypatch.setattr(preferences_runs, "is_right_pirate", lambda *pair: judged.append(pair) or len(judged) in (3, 4))
    model, pairs = preferences_runs.start_of.__wrapped__(base, 0)
    assert len(pairs) == 1, "of two prompts one has right and wrong samples"
    answers = [row[row != IGNORE].tolist() for row in pairs.labels[0]]
    assert answers == [drawn[2], drawn[0]], "the first right sample over the first wrong one"
    for ids, labels, own in zip(pairs.input_ids[0], pairs.labels[0], answers, strict=True):
        end = int((labels != IGNORE).nonzero().max()) + 1
        assert ids[end - 2 : end].tolist() == own and base.tokenizer.decode(ids[: end - 2].tolist()).endswith("Pirate:")
    assert not any("lora" in name for name, _ in model.named_parameters()), "the start is a plain model"


# Costs and figures


def test_a_reference_by_switching_off_costs_no_memory_and_a_second_model_its_weights(base, monkeypatch):
    shape = GPTConfig(97, 32, 64, 1, 2, max_position_embeddings=64)
    monkeypatch.setattr(preferences_costs, "shape_of", lambda setting: shape)
    plan = preferences.BYTES.plans["tiny"]
    plan = replace(plan, settings={"step": {"dtype": "float32", "pairs": 2, "length": 8}})
    above = {
        name: preferences_costs.bytes_of_a_step(Setting(base, plan, arm, None, 0))["scores"]["above, % of weights"]
        for name, arm in preferences.BYTES.arms.items()
    }
    assert abs(above["adapter off"]) < 1 and abs(above["full, beforehand"]) < 1, above
    assert above["second model"] == pytest.approx(above["adapter off"] + 100), above


def test_times_are_those_of_three_kinds_of_steps(base, monkeypatch):
    plan = replace(preferences.TIME.plans["tiny"], settings={"rounds": 1, "pairs": 2})
    arm = preferences.TIME.arms["steps"]
    scores = preferences_costs.time_of_a_step(Setting(base, plan, arm, None, 0))["scores"]
    assert set(scores) == {"beforehand", "adapter off"} and min(scores.values()) > 20
    rows = {}
    monkeypatch.setattr(preferences_costs, "training_step", lambda model, optimizer, *step: step)
    monkeypatch.setattr(
        preferences_costs,
        "ratios_in_turn",
        lambda actions, *_: rows.update({name: action() for name, action in actions.items()}) or {},
    )
    preferences_costs.time_of_a_step(Setting(base, plan, arm, None, 0))
    assert rows["sft"][0].shape == (4, rows["beforehand"][0].shape[2]), "as many rows of as many tokens"
    known = {name: len(step[-1]) for name, step in rows.items()}
    assert known == {"sft": 0, "beforehand": 1, "adapter off": 0}, "the reference alone is computed beforehand"


def test_the_figure_shows_every_rate_and_what_the_pairs_say():
    look = {"accuracy": 1.0, "chosen": -5.0, "rejected": -9.0}
    runs = {
        arm: {0: {"curve": [look | {"step": 0, "said": 0}, look | {"step": 5, "said": said, "chosen": -100 * said}]}}
        for arm, said in (("dpo 0.0001", 0.3), ("dpo 0.001", 0.8), ("dpo + sft 0.001", 1.0), ("sft 0.003", 0.9))
    }
    upper, lower = preferences_figures.what_is_said("made up", runs | {"base": {}}).axes
    ends = {line.get_label(): line.get_ydata()[-1] for line in [*upper.lines, *lower.lines]}
    assert ends == {
        "said, DPO at 0.0001": 30,
        "said, DPO at 0.001": 80,
        "said, SFT on the chosen": 90,
        "preference accuracy, DPO": 100,
        "chosen answer": -80,
        "rejected answer": -9,
    }
