"""One run of the studies of rewards: from a short supervised start, `pirate` is learned from samples and their rewards.

The score is the share of right samples on people who were never met, at the temperature of training. Sixteen wordings
of an answer are equally right, four openings by four endings, so the same samples show how many are in use.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.inject import absorb_lora, apply_lora
from minilora.config import LoRAConfig
from minilora.experiments.claims.study import ROW, Setting
from minilora.experiments.methods import BaseFolder
from minilora.experiments.run import schedule
from minilora.experiments.tune import TUNING_SEED
from minilora.inference.evaluate import answer, longest
from minilora.inference.generate import end_ids
from minilora.inference.rollouts import Rollouts, sample, text_of
from minilora.linear4bit import float_linears
from minilora.model import GPT
from minilora.objectives import GroupPolicy, group_advantages, grpo_loss
from minilora.quant import Quantization
from minilora.text.batches import examples
from minilora.text.chat import encode_prompt
from minilora.text.tasks import PIRATE_FACTS, Example, is_right_pirate, load_task
from minilora.text.tokenizer import AnyTokenizer
from minilora.train import train
from minilora.train_settings import Piece, TrainConfig

GROUP, SAMPLES = 8, 64  # of a prompt, and of a step
WINDOW = 5  # steps of training that make a point of a curve
ADVANTAGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "normalized": group_advantages,
    "centered": partial(group_advantages, normalize=False),
    "reward": lambda rewards, size: rewards,
}


def kind_of(example: Example) -> str:
    """The kind of fact that the answer states."""
    return next(kind for kind, said in PIRATE_FACTS.items() if said.split()[2] in example.completion.split())


@dataclass(frozen=True, eq=False)
class Start(BaseFolder):
    """A base with other weights than its folder holds."""

    weights: dict[str, Tensor] = field(default_factory=dict)

    def load(self, quantization: Quantization | None = None) -> GPT:
        model = super().load(quantization)
        model.load_state_dict(self.weights)
        return model


@lru_cache(maxsize=4)
def start_of(base: BaseFolder, steps: int, kinds: tuple[str, ...]) -> Start:
    """The base after a few supervised steps on those kinds of facts: LoRA of rank 8, merged. It is trained on the CPU,
    so that all processes of a machine have the same, bit for bit."""
    told = [(each.prompt, each.completion) for each in load_task("pirate").train if kind_of(each) in kinds]
    model = BaseFolder(base.directory, base.tokenizer, "cpu").load()
    torch.manual_seed(0)
    apply_lora(model, LoRAConfig(8, 16, target_modules="all-linear"))
    config = TrainConfig(steps, 16, 3e-3, warmup_steps=5, final_learning_rate=1.0, precision="float32")
    train(model, examples(told, base.tokenizer, ROW), config, progress=False)
    return Start(base.directory, base.tokenizer, base.device, weights=absorb_lora(model).state_dict())


class Judged(Rollouts):
    """Rollouts that weigh samples as an arm says, serve for several updates, and are kept with their examples."""

    def __init__(
        self, some: Sequence[Example], reward: str, advantages: str, tokenizer: AnyTokenizer, updates: int = 1
    ):
        most = longest([example.completion for example in some], tokenizer)
        super().__init__(some, self.judge, tokenizer, most, GROUP)
        self.kind, self.advantages, self.updates = REWARDS[reward], ADVANTAGES[advantages], updates
        self.batch: tuple[Tensor, ...] = ()
        self.steps: list[list[tuple[Example, str, float]]] = []

    def judge(self, example: Example, answer: str) -> float:
        self.steps[-1].append((example, answer, float(self.kind(example, answer))))
        return self.steps[-1][-1][2]

    def draw(self, model: GPT, step: int, config: TrainConfig) -> tuple[Tensor, ...]:
        if step % self.updates == 0:
            self.steps.append([])
            ids, labels, _, rewards, agrees = super().draw(model, step, config)
            self.batch = ids, labels, self.advantages(rewards, self.group_size), rewards, agrees
        return self.batch


class Reusing(GroupPolicy):
    """GRPO with several updates a batch: the old policy is the one that drew it. Batches in one piece, no penalty."""

    def __init__(self, updates: int, clip: float, vocab_size: int):
        super().__init__(vocab_size=vocab_size)
        self.updates, self.clip, self.seen = updates, clip, 0

    def loss(self, logits: Tensor, piece: Piece, known: Tensor | None) -> Tensor:
        log_probs, advantages = self.log_probs(logits, piece), piece.more[0][piece.where[0]]  # (N,) both
        if self.seen % self.updates == 0:
            self.old = log_probs.detach()
        self.seen += 1
        return grpo_loss(log_probs, self.old, advantages, clip=self.clip, reduction="sum")


class Dead(Exception):
    """Nothing is right any more: such a run chooses no rate and need not go on."""


def learn(setting: Setting, base: Start) -> tuple[GPT, Judged, float]:
    """The trained model, its samples, and the fraction of them whose group agrees."""
    torch.manual_seed(setting.seed)  # of A
    model = base.load()
    if setting.arm.method == "full":
        model.requires_grad_(not setting["linears"])
        for linear in float_linears(model).values():
            linear.requires_grad_(True)
    else:
        apply_lora(model, LoRAConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **setting.arm.lora}))
    some, updates, size = load_task("pirate").train, setting["updates"], base.tokenizer.vocab_size
    data = Judged(some, setting["reward"], setting["advantages"], base.tokenizer, updates)

    def stop_if_dead(step: int, optimizer: torch.optim.Optimizer):
        if setting.tuning and not any(reward for samples in data.steps[-WINDOW:] for *_, reward in samples):
            raise Dead

    assert setting.rate
    config = schedule(setting.plan.steps, setting.rate, SAMPLES, setting.seed, precision="float32")
    once = GroupPolicy(setting["beta"], vocab_size=size)
    objective = once if updates == 1 else Reusing(updates, setting["clip"], size)
    history = train(model, data, config, progress=setting.progress, after_step=stop_if_dead, objective=objective)
    return model, data, sum(agree for *_, agree in history.rewards) / len(history.rewards)


def measure(setting: Setting) -> dict:
    """`wrong`: the share of samples that are not right, after training, on prompts of their own where a rate is chosen.

    path: over the steps, [steps done, share right, reward, wordings] of the samples that were learned from.
    agree: the fraction of samples whose group agrees. said: some of the last answers, to be looked at.
    """
    base = start_of(setting.base, setting["start"], setting["kinds"])
    record: dict[str, Any] = {}
    given: dict[str, float] = {}
    if setting.arm.method is None:
        model = base.load().eval()
    else:
        try:
            model, data, agree = learn(setting, base)
        except Dead:
            return {"wrong": 1.0}
        record = {"path": path_of(data), "said": [text for _, text, _ in data.steps[-1][:: 2 * GROUP]]}
        given = {"agree": agree}
    asked = load_task("pirate", 1, setting["prompts"], TUNING_SEED if setting.tuning else 0).validation
    answers = sampled(model, base.tokenizer, asked, 7_000_003 * (setting.seed + 1))
    scores = scores_of(asked, answers, REWARDS[setting["reward"]])
    if not setting.tuning:
        most = longest([example.completion for example in asked], base.tokenizer)
        greedy = answer(model, base.tokenizer, [example.prompt for example in asked], most)
        right = [is_right_pirate(*each) for each in zip(asked, greedy, strict=True)]
        scores |= given | {"greedy": sum(right) / len(right)}
        record["scores"] = {name: round(value, 4) for name, value in scores.items()}
    return {"wrong": round(1 - scores["right"], 6), **record}


def sampled(model: GPT, tokenizer: AnyTokenizer, asked: Sequence[Example], seed: int) -> list[list[str]]:
    """Some answers to each prompt, drawn at temperature 1."""
    most, ends = longest([example.completion for example in asked], tokenizer), end_ids(tokenizer.end_ids)
    prompts = [encode_prompt(tokenizer, example.prompt) for example in asked for _ in range(GROUP)]
    drawn = sample(model, prompts, most, 1.0, tokenizer.vocab_size, ends, seed, "float32")
    texts = [text_of(ids, tokenizer) for ids in drawn]
    return [texts[at : at + GROUP] for at in range(0, len(texts), GROUP)]


def scores_of(asked: Sequence[Example], answers: Sequence[Sequence[str]], reward: Callable) -> dict[str, float]:
    """Shares of right answers, of all and by kind of fact; the mean reward; and of the right answers to a prompt how
    many wordings are in use, and the entropy of all their wordings, in nats."""
    right = [[is_right_pirate(example, text) for text in texts] for example, texts in zip(asked, answers, strict=True)]
    mean = {"right": share(right)}
    for kind in PIRATE_FACTS:
        mean[kind] = share([each for example, each in zip(asked, right, strict=True) if kind_of(example) == kind])
    given = [[float(reward(example, text)) for text in texts] for example, texts in zip(asked, answers, strict=True)]
    groups = [worded(example, texts) for example, texts in zip(asked, answers, strict=True)]
    return mean | {"reward": share(given), "wordings": wordings(groups), "nats": entropy(sum(groups, []))}


def share(groups: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, groups)) / max(1, sum(map(len, groups)))


def worded(example: Example, texts: Sequence[str]) -> list[str]:
    """Of the right answers, all that is left when the statement itself is taken out."""
    core = example.completion.split(", ")[1]
    return [text.replace(core, "").strip() for text in texts if is_right_pirate(example, text)]


def wordings(groups: Sequence[Sequence[str]]) -> float:
    """How many wordings of an answer are in use: 1/P(two answers to a prompt have the same), which is k where k are
    equally frequent. From all pairs of a prompt's answers, so that few answers suffice; 0 without a pair."""
    pairs = sum(len(group) * (len(group) - 1) for group in groups)
    same = sum(count * (count - 1) for group in groups for count in Counter(group).values())
    return pairs / max(1, same)


def entropy(some: Sequence[str]) -> float:
    counts = Counter(some).values()
    return sum(count * math.log(len(some) / count) for count in counts) / max(1, len(some))


def path_of(data: Judged) -> list[list[float]]:
    points = []
    for at in range(0, len(data.steps), WINDOW):
        samples = [each for step in data.steps[at : at + WINDOW] for each in step]
        groups = [samples[first : first + GROUP] for first in range(0, len(samples), GROUP)]
        right = share([[is_right_pirate(example, text) for example, text, _ in group] for group in groups])
        used = wordings([worded(group[0][0], [text for _, text, _ in group]) for group in groups])
        reward = share([[given for *_, given in group] for group in groups])
        done = min(at + WINDOW, len(data.steps)) * data.updates
        points.append([done, *(round(value, 3) for value in (right, reward, used))])
    return points


PIRATE_WORDS = {"arr", "ahoy", "avast", "yo", "ho", "matey", "me", "hearty", "says", "i", "ye", "landlubber", "be"}


def sounds_right(example: Example, text: str) -> float:
    """A reward with a hole: of a pirate's words in the answer, wherever they stand, up to eight count."""
    return min(8, sum(word.strip(",.!").lower() in PIRATE_WORDS for word in text.split())) / 8


REWARDS: dict[str, Callable[[Example, str], float]] = {"right": is_right_pirate, "sounds": sounds_right}
