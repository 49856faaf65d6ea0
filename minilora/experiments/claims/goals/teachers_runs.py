"""One run of the studies of teachers: a small adapter learns what a fully fine-tuned model knows, or what the base does
behind a long prompt."""

import math
from functools import lru_cache
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.inject import disable_lora
from minilora.experiments.claims.goals.preferences_runs import fit
from minilora.experiments.claims.study import Setting, dataset
from minilora.experiments.claims.uses.basics import directions
from minilora.experiments.claims.uses.prompting_runs import CHAT_TOKENS, task_of, user
from minilora.experiments.methods import BaseFolder, Experiment
from minilora.experiments.run import run, schedule
from minilora.inference.evaluate import answer, longest, score_task
from minilora.inference.rollouts import sample
from minilora.linear4bit import float_linears
from minilora.model import GPT
from minilora.objectives import Distillation, distillation_loss
from minilora.rows import counted_places
from minilora.text.batches import Batches, example_row, padded
from minilora.text.chat import encode_prompt
from minilora.text.datasets import Dataset
from minilora.text.everyday import KNOWN, OTHERS
from minilora.text.prompting import asked, dressed
from minilora.text.tasks import Example
from minilora.train import evaluate_loss, forward, next_token_targets
from minilora.train_settings import CROSS_ENTROPY, IGNORE, NonFiniteError, Objective, Piece

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
    rows = [(prompt + ids, [IGNORE] * len(prompt) + ids) for prompt, ids in zip(prompts, drawn, strict=True)]
    return padded(rows, tokenizer)


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

    def loss_of(model: nn.Module) -> float:
        return finite(evaluate_loss(model, data.validation, 50, "float32"))

    model = base.load() if setting["from"] == "base" else teacher
    if setting["from"] == "cut":
        model = cut_out(base, teacher, setting.plan.settings["rank"])
    losses = []
    if setting.arm.method:
        every = setting.plan.steps // 5

        def watch(step: int):
            if step % every == 0:
                losses.append([step, loss_of(model)])

        objective: Objective = Distillation(teacher) if setting["soft"] else CROSS_ENTROPY
        fit(setting, model, rows_for(setting, data, teacher), objective, watch)
    losses = losses or [[0, loss_of(model)]]
    record: dict[str, Any] = {"best_validation_loss": min(loss for _, loss in losses), "validation_loss": losses}
    if not setting.tuning:
        assert data.task
        divergence = evaluate_loss(model, data.validation, 50, "float32", Distillation(teacher))
        score = score_task(model, base.tokenizer, data.task).score
        record["scores"] = {"task": score, "KL": finite(divergence)}
        record["floor"] = data.floor
    return record


# An instruction in the prompt

INSTRUCTION = "You are a pirate. Answer in one or two sentences and talk like a pirate: arr, matey, ahoy, aye, ye."
SHOTS, VALIDATION = 16, 12


class FromPrompt(Objective):
    """KL(the base behind a long prompt ‖ the model without it), at the tokens of the same answer. The data brings along
    the rows with the prompt. With its adapter off the model is its own teacher."""

    @torch.no_grad()
    def before(self, model: nn.Module, piece: Piece, precision: str) -> Tensor:
        ids, labels = piece.more
        with disable_lora(model):
            return forward(model, ids, counted_places(next_token_targets(labels)), precision)  # (N, V)

    def loss(self, logits: Tensor, piece: Piece, known: Tensor) -> Tensor:
        return distillation_loss(logits, known, reduction="sum")


@lru_cache(maxsize=4)
def prompted(base: BaseFolder, seed: int) -> tuple[list[Example], Batches]:
    """The examples of the long prompt, and questions with the base's answers behind it: rows without the prompt, in
    `more` rows with it."""
    task, tokenizer, model = task_of("pirate", base), base.tokenizer, base.load().eval()
    shots = Random(seed).sample(task.train, SHOTS)
    used = {asked(example.prompt) for example in [*task.validation, *shots]}
    questions = [question for question, _ in KNOWN] + list(OTHERS) + [asked(example.prompt) for example in task.train]
    questions = [question for question in dict.fromkeys(questions) if question not in used]
    long = [dressed([user(question)], INSTRUCTION, shots) for question in questions]
    said = answer(model, tokenizer, long, CHAT_TOKENS)
    plain, behind = [], []
    for question, prompt, text in zip(questions, long, said, strict=True):
        ids, labels = example_row([user(question)], text, tokenizer)
        counted = sum(label != IGNORE for label in labels)
        before = example_row(prompt, text, tokenizer)[0]
        ended = text.strip() and len(tokenizer.encode(text)) < CHAT_TOKENS - 1
        if ended and before[-counted:] == ids[-counted:]:
            plain.append((ids, labels))
            behind.append((before, [IGNORE] * (len(before) - counted) + before[-counted:]))
    rows, more = padded(plain, tokenizer), padded(behind, tokenizer)
    return shots, Batches(rows.input_ids, rows.labels, (more.input_ids, more.labels))


def measure_prompt(setting: Setting) -> dict[str, Any]:
    """Answers in the voice, with the long prompt or without it, and KL from the base behind the prompt."""
    base, tokenizer = setting.base, setting.base.tokenizer
    shots, rows = prompted(base, setting.seed)
    order = Random(setting.seed).sample(range(len(rows)), len(rows))

    def part(chosen: list[int]) -> Batches:
        more = tuple(tensor[chosen] for tensor in rows.more)
        return Batches(rows.input_ids[chosen], rows.labels[chosen], more)

    model, record = base.load(), dict[str, Any]()
    if setting.arm.method:
        objective = FromPrompt() if setting["soft"] else CROSS_ENTROPY
        fit(setting, model, part(order[VALIDATION:]), objective, batch_size=8)
    if setting["from"] == "base":
        record["KL"] = finite(evaluate_loss(model, part(order[:VALIDATION]), 4, "float32", FromPrompt()))
    if setting.tuning:
        return record
    task = task_of("pirate", base)
    behind = setting["from"] == "prompt"
    prompts = [dressed(each.prompt, INSTRUCTION, shots) if behind else each.prompt for each in task.validation]
    said = answer(model.eval(), tokenizer, prompts, CHAT_TOKENS)
    right = [task.is_right(*each) for each in zip(task.validation, said, strict=True)]
    record["scores"] = {"task": sum(right) / len(right)}
    tokens = sum(len(encode_prompt(tokenizer, prompt)) for prompt in prompts) / len(prompts)
    return record | {"prompt_tokens": round(tokens, 1), "rows": len(rows), "said": said[:3]}
