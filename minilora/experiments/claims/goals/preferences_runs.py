"""One run of the studies of preferences: what a model says while it learns from pairs, beside what their loss says.

"Said" are samples at temperature 1 on held-out prompts. Log-probabilities of answers are reported without their end
token. The base never ends after a sentence of `wording`. With end tokens both answers of a pair have one, and it is not
neutral: to end after the chosen sentence alone, from which the base is 15 nats away, is an easier way to part the two
than to say one of them more often. So these pairs are trained on without it, but for one arm.
"""

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.inject import absorb_lora, apply_lora, disable_lora, lora_layers
from minilora.config import LoRAConfig
from minilora.experiments.claims.study import ROW, Setting
from minilora.experiments.methods import BaseFolder
from minilora.experiments.run import schedule
from minilora.inference.evaluate import answer, longest
from minilora.inference.rollouts import sample, text_of
from minilora.model import GPT
from minilora.objectives import Preference, dpo_loss, log_probs_of, token_log_probs
from minilora.text.batches import Batches, answered, pack
from minilora.text.chat import encode_prompt
from minilora.text.preferences import load_preferences, world_pairs
from minilora.text.tasks import Example, is_right_pirate, load_task
from minilora.text.tokenizer import AnyTokenizer
from minilora.text.world import FACTS, World
from minilora.train import evaluate_loss, train
from minilora.train_settings import CROSS_ENTROPY, IGNORE, History, NonFiniteError, Objective, Piece

HELD_OUT, DOCUMENTS = 100, 40  # pairs and prompts; of old text
CONSTANT: dict[str, Any] = {
    "batch_size": 16,
    "final_learning_rate": 1.0,
}  # so that each step is the end of a shorter run


class PreferenceAndChosen(Preference):
    """DPO, and the cross entropy per token of the chosen answer (Pang 2024, arXiv:2404.19733, equation 1, α = 1)."""

    def loss(self, logits: Tensor, piece: Piece, known: Tensor) -> Tensor:
        rows = piece.where[0]  # (N,): even ones are chosen
        each = log_probs_of(logits, piece.targets[piece.where]) / rows.bincount()[rows]  # (N,)
        return super().loss(logits, piece, known) - each[rows % 2 == 0].sum()


def fit(
    setting: Setting, model: GPT, rows: Any, objective: Objective = CROSS_ENTROPY, watch: Any = None, **training
) -> History:
    """Trains a new adapter on `model`, in float32. watch: called with the number of steps done after each step."""
    rate = setting["rate"] if setting.rate is None else setting.rate
    config = schedule(
        **{"steps": setting.plan.steps, "learning_rate": rate, "seed": setting.seed, "precision": "float32", **training}
    )
    torch.manual_seed(setting.seed)
    apply_lora(model, LoRAConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **setting.arm.lora}))
    after = None if watch is None else lambda step, optimizer: watch(step)
    return train(model, rows, config, objective=objective, after_step=after, progress=setting.progress)


# What is said


def style_of(example: Example, rejected: str, said: str) -> str:
    """Whether an answer begins with a whole sentence in the chosen style, in the rejected one, or in neither."""
    text = said.strip()
    if "pirate" in example.prompt:
        if is_right_pirate(example, said):
            return "chosen"
        return "rejected" if text.startswith(rejected.strip()) else "neither"
    for style, sentence in (("chosen", 0), ("rejected", 1)):
        whole = (
            sentences[sentence].removeprefix("{name} ").format(value=value)
            for values, sentences, _ in FACTS.values()
            for value in values
        )
        if text.startswith(tuple(whole)):
            return style
    return "neither"


class Held:
    """Held-out pairs, prompts to answer, and old text, on which nothing is trained."""

    def __init__(self, name: str, tokenizer: AnyTokenizer):
        self.tokenizer, self.asked = tokenizer, world_pairs(name, "validation", HELD_OUT)
        self.pairs = pairs_of(name, tokenizer, "validation", ends=name != "wording")
        self.prompts = [encode_prompt(tokenizer, example.prompt) for example, _ in self.asked]
        both = [said for example, rejected in self.asked for said in (example.completion, rejected)]
        self.new_tokens = longest(both, tokenizer)
        documents = [tokenizer.encode(document.text) for document in World().documents(DOCUMENTS, seed="preferences")]
        self.old_text = pack(documents, ROW, tokenizer)

    @torch.no_grad()
    def log_probs(self, model: GPT) -> Tensor:
        """Of the pairs' answers with and without their end token, (2, N, 2)."""
        device = model.lm_head.weight.device
        ids, labels = (part.flatten(0, 1).to(device) for part in (self.pairs.input_ids, self.pairs.labels))
        each = token_log_probs(model, ids, labels, "float32")  # (2N, T - 1)
        without = each.masked_fill(labels[:, 1:] == self.tokenizer.eos_id, 0)
        return torch.stack([each.sum(1), without.sum(1)]).view(2, -1, 2).cpu()

    def samples(self, model: GPT, seed: int) -> list[list[int]]:
        ends = self.tokenizer.end_ids
        return sample(model, self.prompts, self.new_tokens, 1.0, self.tokenizer.vocab_size, ends, seed, "float32")

    def shares(self, answers: list[str]) -> dict[str, float]:
        styles = [style_of(*pair, said) for pair, said in zip(self.asked, answers, strict=True)]
        return {style: styles.count(style) / len(styles) for style in ("chosen", "rejected", "neither")}

    def point(self, model: GPT, step: int, seed: int, start: Tensor | None, beta: float) -> dict[str, Any]:
        """start: log-probabilities before training."""
        model.eval()
        log_probs = self.log_probs(model)
        whole, without = log_probs
        reference = whole if start is None else start[0]
        margin = (whole - reference)[:, 0] - (whole - reference)[:, 1]
        said = self.shares([text_of(ids, self.tokenizer) for ids in self.samples(model, seed)])
        found = {
            "accuracy": ((margin > 0).float() + (margin == 0) / 2)
            .mean()
            .item(),  # TRL's rewards/accuracies, but for ties
            "likelier": (whole[:, 0] > whole[:, 1]).float().mean().item(),
            "loss": dpo_loss(whole[:, 0], whole[:, 1], reference[:, 0], reference[:, 1], beta).item(),
            "chosen": without[:, 0].mean().item(),
            "rejected": without[:, 1].mean().item(),
            "said": said["chosen"],
            "said, rejected": said["rejected"],
        }
        model.train()
        return {"step": step} | {name: round(value, 4) for name, value in found.items()}

    @torch.no_grad()
    def divergence(self, model: GPT, seed: int) -> float:
        """KL(policy ‖ reference) in nats an answer, from samples of the policy; 0 without an adapter."""
        if not any(lora_layers(model)):
            return 0.0
        drawn = self.samples(model, seed)
        rows = answered(self.prompts, drawn, self.tokenizer)
        ids, labels = (part.to(model.lm_head.weight.device) for part in (rows.input_ids, rows.labels))
        policy = token_log_probs(model, ids, labels, "float32").sum(1)
        with disable_lora(model):
            return (policy - token_log_probs(model, ids, labels, "float32").sum(1)).mean().item()


held_of = lru_cache(maxsize=2)(Held)


def pairs_of(name: str, tokenizer: AnyTokenizer, split: str, ends: bool) -> Batches:
    """Input_ids and labels (N, 2, T). ends: whether the end tokens of the answers count."""
    pairs = getattr(load_preferences(name, tokenizer, ROW, HELD_OUT), split)
    if not ends:
        pairs.labels[pairs.labels == tokenizer.eos_id] = IGNORE
    return pairs


def measure(setting: Setting) -> dict[str, Any]:
    """From the base, with given pairs."""
    pairs = pairs_of(setting.plan.data, setting.base.tokenizer, "train", setting["ends"])
    return followed(setting, setting.base.load(), pairs)


def followed(setting: Setting, model: GPT, pairs: Batches) -> dict[str, Any]:
    """Trains by the arm's goal and looks at the model along the way. A run that diverges ends at its last good step."""
    held, beta = held_of(setting.plan.data, setting.base.tokenizer), setting["beta"]
    curve = [held.point(model, 0, setting.seed, None, beta)]
    start, old_loss = held.log_probs(model), evaluate_loss(model, held.old_text, 40, "float32")

    def watch(step: int):
        if step in setting["looks"]:
            curve.append(held.point(model, step, setting.seed, start, beta))

    rows: Batches = pairs
    objective: Objective = CROSS_ENTROPY
    if setting["goal"] == "sft":
        rows = Batches(pairs.input_ids[:, 0], pairs.labels[:, 0])
    else:
        objective = (Preference if setting["goal"] == "dpo" else PreferenceAndChosen)(beta)
    if setting["goal"]:
        try:
            fit(setting, model, rows, objective, watch, **CONSTANT)
        except NonFiniteError:
            pass
    model.eval()
    first, last = curve[0], curve[-1]
    forgot = evaluate_loss(model, held.old_text, 40, "float32") - old_loss
    greedy = answer(model, setting.base.tokenizer, [pair.prompt for pair, _ in held.asked], held.new_tokens, 100)
    scores = {name: last[name] for name in ("said", "accuracy")} | {
        "said, greedy": held.shares(greedy)["chosen"],
        "chosen": last["chosen"] - first["chosen"],
        "KL": round(held.divergence(model, setting.seed), 3),
        "forgot": round(forgot, 4),
    }
    return {"scores": scores, "curve": curve, "answers": greedy[:3]}


# After supervised training

START: dict[str, Any] = {"steps": 45, "learning_rate": 3e-3}  # after which about half of the samples are right
PROMPTS, SAMPLES = 200, 4


@lru_cache(maxsize=4)
def start_of(base: BaseFolder, seed: int) -> tuple[GPT, Batches]:
    """A base that speaks as a pirate half of the time, and pairs of its own samples, right over wrong."""
    tokenizer, task, model = base.tokenizer, load_task("pirate"), base.load()
    rows = load_preferences("voice", tokenizer, ROW, 1).train
    torch.manual_seed(seed)
    apply_lora(model, LoRAConfig(8, 16, target_modules="all-linear"))
    config = schedule(**START, **CONSTANT, seed=seed, precision="float32")
    train(model, Batches(rows.input_ids[:, 0], rows.labels[:, 0]), config, progress=False)
    absorb_lora(model)
    asked = [example for example in task.train[:PROMPTS] for _ in range(SAMPLES)]
    prompts = [encode_prompt(tokenizer, example.prompt) for example in asked]
    new = longest([example.completion for example in asked], tokenizer)
    drawn = sample(model, prompts, new, 1.0, tokenizer.vocab_size, tokenizer.end_ids, seed, "float32")
    right = [is_right_pirate(*each) for each in zip(asked, (text_of(ids, tokenizer) for ids in drawn), strict=True)]
    own: list[int] = []  # of each prompt the first right answer and the first wrong one, where it has both
    for first in range(0, len(asked), SAMPLES):
        both = [[n for n in range(first, first + SAMPLES) if right[n] is wanted] for wanted in (True, False)]
        if all(both):
            own += [each[0] for each in both]
    pairs = answered([prompts[n] for n in own], [drawn[n] for n in own], tokenizer)
    return model, Batches(pairs.input_ids.unflatten(0, (-1, 2)), pairs.labels.unflatten(0, (-1, 2)))


def measure_after(setting: Setting) -> dict[str, Any]:
    """From a start that knows the style: with pairs of its own samples, or with given ones, as many."""
    model, pairs = start_of(setting.base, setting.seed)
    if setting["pairs"] == "given":
        given = load_preferences("voice", setting.base.tokenizer, ROW, 1).train
        pairs = Batches(given.input_ids[: len(pairs)], given.labels[: len(pairs)])
    return followed(setting, copy.deepcopy(model), pairs) | {"pairs": len(pairs)}
