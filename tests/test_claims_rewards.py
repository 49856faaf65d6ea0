"""The studies of rewards: what a run trains, what it is paid for, and what is counted of its samples."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from minilora.experiments.claims import study
from minilora.experiments.claims.goals import rewards, rewards_runs
from minilora.experiments.claims.goals.rewards_figures import curves, reward_against_diversity
from minilora.experiments.claims.goals.rewards_runs import Dead, Judged, kind_of, sounds_right, wordings
from minilora.experiments.claims.study import Plan, Setting
from minilora.experiments.run import open_base
from minilora.experiments.tune import TUNING_SEED
from minilora.model import GPT, GPTConfig
from minilora.text.tasks import ENDINGS, OPENINGS, PIRATE_FACTS, Example, is_right_pirate, load_task
from minilora.train_settings import Piece, TrainConfig

CLAIMS = {claim.name: claim for claim in rewards.CLAIMS}
CORES = {"town": "Ann Lee be livin' in Elton", "food": "Bo Fry be lovin' corn"}
EXAMPLES = {kind: Example("", f" Arr, {core}, matey!") for kind, core in CORES.items()}


@pytest.fixture(scope="module")
def base():
    return open_base(study.BASES["tiny"])


@pytest.fixture
def small(base):
    """A start with the base's tokenizer and few weights, none of them trained."""
    config = GPTConfig(base.tokenizer.vocab_size, 16, 24, 1, 2)
    return SimpleNamespace(tokenizer=base.tokenizer, load=lambda: GPT(config))


@pytest.fixture(scope="module")
def setting_of(base):
    plan = rewards.REWARDS.plans["tiny"]

    def make(arm: str, seed: int = 0, steps: int = 1) -> Setting:
        small = Plan(plan.data, steps, 1, 1, plan.settings | {"prompts": 2})
        return Setting(base, small, rewards.ARMS[arm], 1e-3, seed, progress=False)

    return make


# What is counted


def test_wordings_in_use_are_those_of_one_prompt():
    for used in (1, 2, 4):
        group = [str(n % used) for n in range(4000)]
        assert wordings([group]) == pytest.approx(used, rel=2e-3), f"{used} equally frequent wordings"
    apart = [["a"] * 8, ["b"] * 8]
    assert wordings(apart) == 1, "each prompt has one wording, though there are two in all"
    assert rewards_runs.entropy(sum(apart, [])) == pytest.approx(math.log(2)), "which the entropy of all shows"
    assert wordings([["a"], []]) == 0, "without a pair of right answers nothing is known"
    assert wordings([["a", "b"], ["a", "a"]]) == 2, "of two pairs one is the same"


def test_samples_are_scored_by_kind_and_only_right_ones_have_a_wording():
    town, food = EXAMPLES.values()
    answers = [
        [f" Ahoy, {CORES['town']}, says I!", f" Ahoy, {CORES['town']}, says I!", " Arr, arr, matey!", ""],
        [f" Arr, {CORES['town']}, matey!", f" Yo ho, {CORES['food']}, me hearty!", " no", f"Arr, {CORES['food']}!"],
    ]
    found = rewards_runs.scores_of([town, food], answers, is_right_pirate)
    assert found["right"] == found["reward"] == 3 / 8 and (found["town"], found["food"]) == (1 / 2, 1 / 4)
    assert found["job"] == 0, "of what is not asked nothing is right"
    assert found["wordings"] == 1, "the one pair of right answers to a prompt is worded the same"
    assert found["nats"] == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_every_example_is_of_the_kind_that_it_states():
    for example in load_task("pirate", 200, 1).train:
        kind = kind_of(example)
        said = PIRATE_FACTS[kind].split("{value}")[0].removeprefix("{name}")
        assert said in example.completion, f"{example.completion} is of kind {kind}"


def test_a_right_answer_never_earns_the_most_of_the_reward_with_a_hole():
    core, example = CORES["town"], EXAMPLES["town"]
    earned = [sounds_right(example, f" {opening}, {core}, {ending}!") for opening in OPENINGS for ending in ENDINGS]
    assert max(earned) == 5 / 8 and sounds_right(example, "Arr, arr, arr! Me hearty, ye landlubber be matey!") == 1
    assert sounds_right(example, core.replace("be", "is")) == 0


def test_samples_are_drawn_at_the_temperature_of_training_eight_to_a_prompt(monkeypatch, base):
    asked, drawn = list(EXAMPLES.values()), []

    def sample(model, prompts, most, temperature, vocab_size, ends, seed, precision):
        drawn.append((len(prompts), temperature, seed))
        return [base.tokenizer.encode(f" {number}") + [base.tokenizer.eos_id] for number in range(len(prompts))]

    monkeypatch.setattr(rewards_runs, "sample", sample)
    answers = rewards_runs.sampled(None, base.tokenizer, asked, 5)
    assert drawn == [(16, 1.0, 5)]
    assert [[int(text) for text in each] for each in answers] == [list(range(8)), list(range(8, 16))], answers


def test_a_run_is_scored_by_its_own_reward_and_greedy_answers_apart(monkeypatch, setting_of, small):
    """Half of the samples sound like a pirate and none is right; all greedy answers are right."""
    sounds = "Arr arr arr arr arr arr arr arr"
    monkeypatch.setattr(rewards_runs, "sampled", lambda model, tokenizer, asked, seed: [[sounds, ""] for _ in asked])
    asked = load_task("pirate", 1, 2, 0).validation
    monkeypatch.setattr(rewards_runs, "answer", lambda *_: [example.completion for example in asked])
    monkeypatch.setattr(rewards_runs, "start_of", lambda *_: small)
    monkeypatch.setattr(rewards_runs, "learn", lambda *_: (None, SimpleNamespace(steps=[[]], updates=1), 0.0))
    for arm, reward in (("hole", 0.5), ("r=8", 0)):
        scores = rewards_runs.measure(setting_of(arm))["scores"]
        assert (scores["right"], scores["reward"], scores["greedy"]) == (0, reward, 1), f"{arm}: {scores}"


def test_rates_are_chosen_on_prompts_that_are_not_reported(monkeypatch, setting_of, small):
    seen, seeds = [], set()

    def sampled(model, tokenizer, asked, seed):
        seen.append({example.prompt for example in asked})
        seeds.add(seed)
        return [[""]] * len(asked)

    stand_ins = {"sampled": sampled, "answer": lambda model, tokenizer, prompts, most: [""] * len(prompts)}
    stand_ins |= {"start_of": lambda *_: small, "learn": lambda *_: (None, SimpleNamespace(steps=[[]], updates=1), 0.0)}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(rewards_runs, name, stand_in)
    for seed in (TUNING_SEED, 0, 1):
        setting = setting_of("r=8", seed)
        setting.plan.settings["prompts"] = 150
        rewards_runs.measure(setting)
    chosen, reported, again = seen
    assert reported == again and len(reported) == 150 and not chosen & reported
    assert len(seeds) == 3, "each run draws its own samples"


# What is trained, and for what


def test_advantages_are_what_the_arms_say():
    given = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    expected = {
        "normalized": [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0],
        "centered": [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0],
        "reward": given.tolist(),
    }
    for name, values in expected.items():
        found = rewards_runs.ADVANTAGES[name](given, 4).tolist()
        assert found == pytest.approx(values, abs=1e-3), f"{name}: {found}"
    assert set(expected) == set(rewards_runs.ADVANTAGES)


def trained_names(monkeypatch, setting: Setting, start) -> tuple[set[str], object]:
    """The parameters that an arm trains, and its objective."""
    seen = SimpleNamespace(names=set(), objective=None)

    def train(model, data, config, objective, **_):
        seen.names = {name for name, p in model.named_parameters() if p.requires_grad}
        seen.objective, seen.data, seen.config = objective, data, config
        return SimpleNamespace(rewards=[[0, 0.5, 0.25]])

    monkeypatch.setattr(rewards_runs, "train", train)
    rewards_runs.learn(setting, start)
    return seen.names, seen


def test_each_arm_trains_what_it_says(monkeypatch, setting_of, small):
    everything = {name for name, _ in small.load().named_parameters()}
    assert trained_names(monkeypatch, setting_of("full"), small)[0] == everything
    linears, _ = trained_names(monkeypatch, setting_of("linears"), small)
    adapted, seen = trained_names(monkeypatch, setting_of("KL 0.04"), small)
    assert linears == {f"{name.rpartition('.')[0]}.weight" for name in adapted}, "the layers that adapters are on"
    assert not any("embed" in name or "norm" in name for name in linears)
    assert (seen.objective.beta, seen.config.precision, seen.config.batch_size) == (0.04, "float32", 64)
    _, seen = trained_names(monkeypatch, setting_of("hole"), small)
    assert seen.data.kind is sounds_right and seen.objective.beta == 0
    _, seen = trained_names(monkeypatch, setting_of("4 updates, no clip"), small)
    assert (seen.data.updates, seen.objective.updates, seen.objective.clip) == (4, 4, math.inf)


def test_a_start_learns_only_the_kinds_that_it_is_told(monkeypatch, base):
    told = []
    monkeypatch.setattr(rewards_runs, "examples", lambda pairs, *_: told.extend(pairs))
    monkeypatch.setattr(rewards_runs, "train", lambda *_, **__: None)
    rewards_runs.start_of(base, 6, rewards.THREE["kinds"])
    kinds = {kind_of(Example(*each)) for each in told}
    assert kinds == set(PIRATE_FACTS) - {rewards.LEFT_OUT} and len(told) > 1000


def test_a_start_stands_in_for_the_base(base):
    weights = base.load().state_dict()
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    start = rewards_runs.Start(base.directory, base.tokenizer, base.device, weights=weights)
    assert all(torch.equal(part, weights[name]) for name, part in start.load().state_dict().items())


def test_samples_are_kept_with_what_they_earned(base):
    data = Judged(list(EXAMPLES.values()), "right", "reward", base.tokenizer)
    for _ in range(rewards_runs.WINDOW + 1):
        data.steps.append([])
        for example in EXAMPLES.values():
            for n in range(rewards_runs.GROUP):
                data.judge(example, example.completion if n < 2 else " no")
    path = rewards_runs.path_of(data)
    assert path == [[5, 0.25, 0.25, 1.0], [6, 0.25, 0.25, 1.0]], path


def test_samples_weigh_what_the_arm_says(small):
    data = Judged(list(EXAMPLES.values()), "right", "reward", small.tokenizer)
    data.kind = lambda example, text: 1.0
    _, _, weights, given, _ = data.draw(small.load(), 0, TrainConfig(1, 8, 1e-3))
    assert weights.tolist() == given.tolist() == [1] * 8, "all are right, and there is no baseline"
    assert len(data.steps[0]) == 8


def test_a_rollout_serves_for_several_updates_and_its_old_policy_is_the_one_that_drew_it(small):
    """Three updates of a batch: the ratios begin at 1 and then move; without the clip the gradient is another."""
    data = Judged(list(EXAMPLES.values()), "right", "reward", small.tokenizer, updates=3)
    config, model = TrainConfig(4, 8, 1e-3), small.load()
    first, *more = (data.draw(model, step, config) for step in range(4))
    same = [torch.equal(first[0], batch[0]) if first[0].shape == batch[0].shape else False for batch in more]
    assert same == [True, True, False] and len(data.steps) == 2, "drawn at steps 0 and 3"
    piece = Piece(torch.zeros(1, 2), torch.tensor([[1, 2]]), (torch.tensor([0, 0]), torch.tensor([0, 1])))
    piece.more = (torch.tensor([1.0]),)
    for clip, expected in ((0.2, 1.2), (math.inf, 1.5)):
        objective = rewards_runs.Reusing(2, clip, 3)
        losses = []
        for ratio in (1.0, 1.5, 1.5):  # of token 1 at the first place, to the even start
            logits = torch.zeros(2, 3)
            logits[0] = torch.tensor([1 - ratio / 3, ratio / 3 * 2, 1 - ratio / 3]).log()
            losses.append(objective.loss(logits, piece, None).item())
        assert losses == pytest.approx([-2, -1 - expected, -2]), f"clip {clip}: {losses}"


def test_a_dead_run_is_stopped_while_a_rate_is_chosen_and_only_then(monkeypatch, setting_of, small):
    def train(model, data, config, after_step, **_):
        for step, reward in enumerate([1.0, 0, 0, 0, 0, 0, 0]):
            data.steps.append([(EXAMPLES["town"], "", reward)])
            after_step(step + 1, None)
        return SimpleNamespace(rewards=[[0, 0.0, 1.0]])

    monkeypatch.setattr(rewards_runs, "train", train)
    _, data, _ = rewards_runs.learn(setting_of("r=8", seed=3), small)
    assert len(data.steps) == 7
    with pytest.raises(Dead):
        rewards_runs.learn(setting_of("r=8", TUNING_SEED), small)
    monkeypatch.setattr(rewards_runs, "start_of", lambda *_: small)
    assert rewards_runs.measure(setting_of("r=8", TUNING_SEED)) == {"wrong": 1.0}


def test_a_real_run_is_measured(monkeypatch, setting_of, small):
    monkeypatch.setattr(rewards_runs, "start_of", lambda *_: small)
    monkeypatch.setattr(rewards_runs, "SAMPLES", 8)
    record = json.loads(json.dumps(rewards_runs.measure(setting_of("KL 0.2"))))
    assert {"right", *PIRATE_FACTS, "reward", "wordings", "nats", "agree", "greedy"} == set(record["scores"])
    assert len(record["path"]) == 1 and record["path"][0][0] == 1 and record["wrong"] == 1 - record["scores"]["right"]


# The rules, and the figures


def runs_of(scores: dict[str, dict[str, float]]) -> dict:
    return {arm: {"scores": each} for arm, each in scores.items()}


def test_the_rules_compare_what_they_say():
    shares = {"r=1": 0.8, "r=8": 0.9, "linears": 0.85, "full": 0.95, "no baseline": 0.98, "no deviation": 0.85}
    runs = runs_of({arm: {"right": value} for arm, value in (shares | {"KL 0.04": 0.7, "start": 0.4}).items()})
    runs |= runs_of({"4 updates": {"right": 0.6}, "4 updates, no clip": {"right": 0.5}})
    runs |= runs_of({"hole": {"right": 0.1}, "three kinds": {"right": 0.9, "food": 0.02}})
    runs["KL 0.04"]["scores"]["wordings"], runs["start"]["scores"]["wordings"] = 3, 12
    found = {name: round(claim.rule.number(runs), 6) for name, claim in CLAIMS.items()}
    assert found == {
        "rl-rank-1": -5,
        "rl-rank-8": -5,
        "rl-baseline": -8,
        "rl-deviation": 5,
        "rl-clip": 10,
        "rl-kl": 25,
        "rl-kl-costs": 20,
        "rl-unseen": 2,
        "rl-hole": -30,
    }, found
    below = {name for name, claim in CLAIMS.items() if not claim.rule.above}
    assert below == {"rl-unseen", "rl-hole"}, f"claims that a number is small: {below}"


def made_up(right: float, used: float, path: bool = True) -> dict[int, dict]:
    runs = {}
    for seed in range(2):
        run: dict = {"scores": {"right": right + seed / 100, "wordings": used}}
        steps = range(5, 45, 5)
        ways = [[step, 0.4 + (right - 0.4) * step / 40, 0.5, 12 + (used - 12) * step / 40] for step in steps]
        runs[seed] = run | ({"path": ways} if path else {})
    return runs


def test_the_figures_show_every_arm_and_the_way_of_those_that_learn():
    runs = {"start": made_up(0.4, 12, path=False), "r=8": made_up(0.9, 1.1), "KL 0.2": made_up(0.7, 8)}
    figure = reward_against_diversity("made up", runs)
    (axes,) = figure.axes
    ways = [line for line in axes.lines if len(line.get_xdata()) == 9]
    assert len(ways) == 2 and list(ways[0].get_ydata())[-1] == pytest.approx(1.1)
    assert [way.get_xdata()[-1] for way in ways] == pytest.approx([0.9, 0.7]), "right, to the right"
    assert {(way.get_xdata()[0], way.get_ydata()[0]) for way in ways} == {(0.405, 12)}, "from the start's mean"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["start", "r=8", "KL 0.2"]
    figure = curves({"reward": 2, "right": 1}, "share")("made up", runs)
    assert {text.get_text() for text in figure.axes[0].texts} == {
        "r=8, reward",
        "r=8, right",
        "KL 0.2, reward",
        "KL 0.2, right",
    }, "the start has no steps"
