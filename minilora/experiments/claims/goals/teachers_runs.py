"""One run of the studies of teachers: a small adapter learns what a fully fine-tuned model knows."""

import math
from functools import lru_cache
from random import Random
from typing import Any

import torch

from minilora.experiments.claims.goals.preferences_runs import fit
from minilora.experiments.claims.study import Setting, dataset, loss_of
from minilora.experiments.claims.uses.basics import directions
from minilora.experiments.methods import BaseFolder, Experiment
from minilora.experiments.run import run, schedule
from minilora.inference.evaluate import longest, score_task
from minilora.inference.rollouts import sample
from minilora.linear4bit import float_linears
from minilora.model import GPT
from minilora.objectives import Distillation
from minilora.text.batches import Batches, answered
from minilora.text.chat import encode_prompt
from minilora.text.datasets import Dataset
from minilora.train_settings import CROSS_ENTROPY, NonFiniteError, Objective

TEACHER_STEPS, TEACHER_RATE = 150, 3e-3


@lru_cache(maxsize=1)
def teacher_of(name: str, base: BaseFolder) -> GPT:
    """The base, fully fine-tuned on all 2,000 examples."""
    config = schedule(TEACHER_STEPS, TEACHER_RATE, evaluations=1, precision="float32")
    model = run(Experiment(base, dataset(name, base), "full", config), progress=False).model
    assert isinstance(model, GPT)
    return model


def rows_for(setting: Setting, data: Dataset, teacher: GPT) -> Batches:
    """Some of the training examples, others for each seed; with the answers that the data gives, or with answers that
    the teacher draws."""
    chosen = Random(setting.seed).sample(range(len(data.train)), setting["examples"])
    if not setting["drawn"]:
        return Batches(data.train.input_ids[chosen], data.train.labels[chosen])
    assert data.task
    tokenizer, some = setting.base.tokenizer, [data.task.train[n] for n in chosen for _ in range(setting["drawn"])]
    prompts = [encode_prompt(tokenizer, example.prompt) for example in some]
    new = longest([example.completion for example in some], tokenizer)
    drawn = sample(teacher, prompts, new, 1.0, tokenizer.vocab_size, tokenizer.end_ids, setting.seed, "float32")
    return answered(prompts, drawn, tokenizer)


@torch.no_grad()
def cut_out(base: BaseFolder, teacher: GPT, rank: int) -> GPT:
    """The base with each linear layer's ΔW of the teacher cut to its first directions: an adapter without training."""
    model = base.load()
    theirs = float_linears(teacher)
    for name, linear in float_linears(model).items():
        _, L, R = directions(theirs[name].weight - linear.weight)
        linear.weight += L[:, :rank] @ R[:rank]
    return model


def finite(loss: float) -> float:
    """Raises NonFiniteError for a loss that is no number."""
    if not math.isfinite(loss):
        raise NonFiniteError(f"the validation loss is {loss}: try a lower learning rate")
    return round(loss, 5)


def measure(setting: Setting) -> dict[str, Any]:
    """Validation loss on the task's own answers along the way, right answers at the end, and KL(teacher ‖ student)."""
    base, data = setting.base, setting.dataset()
    teacher = teacher_of(setting.plan.data, base)

    model = base.load() if setting["from"] == "base" else teacher
    if setting["from"] == "cut":
        model = cut_out(base, teacher, setting.plan.settings["rank"])

    def now() -> float:
        return finite(loss_of(model, data.validation))

    losses = []
    if setting.arm.method:
        every = setting.plan.steps // 5

        def watch(step: int):
            if step % every == 0:
                losses.append([step, now()])

        objective: Objective = Distillation(teacher) if setting["soft"] else CROSS_ENTROPY
        fit(setting, model, rows_for(setting, data, teacher), objective, watch)
    losses = losses or [[0, now()]]
    record: dict[str, Any] = {"best_validation_loss": min(loss for _, loss in losses), "validation_loss": losses}
    if not setting.tuning:
        assert data.task
        divergence = loss_of(model, data.validation, Distillation(teacher))
        score = score_task(model, base.tokenizer, data.task).score
        record["scores"] = {"task": score, "KL": finite(divergence)}
    return record
