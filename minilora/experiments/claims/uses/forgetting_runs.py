"""One run of the studies of forgetting: what is trained, and what is measured along the way and at the end."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.adapters.inject import disable_lora, lora_layers
from minilora.adapters.prompts import Prompt
from minilora.experiments.claims.study import Setting, losses
from minilora.experiments.methods import BaseFolder
from minilora.inference.evaluate import answer, evaluate_world, score_task
from minilora.model import GPT
from minilora.text.batches import Batches, examples, pack
from minilora.text.chat import ChatPrompt
from minilora.text.commands import commands, user
from minilora.text.datasets import Dataset
from minilora.text.old_text import QUESTIONS, ROW, english_replay, english_text, is_answered, world_replay, world_text
from minilora.text.world import DOCUMENT_KINDS
from minilora.train import evaluate_loss
from minilora.train_settings import IGNORE


class Old:
    """What the base can do: rows of old text by kind, its losses there, and its logits on one batch."""

    def __init__(self, base: BaseFolder, english: bool):
        self.tokenizer = base.tokenizer
        self.counts = ("prose",) if english else tuple(DOCUMENT_KINDS)  # kinds in the mean that the rules look at
        self.asked: list[ChatPrompt] = [user(question) for question in QUESTIONS] if english else []
        model = base.load().eval()
        self.rows = (english_text if english else world_text)(base.tokenizer)
        if english:  # its own answers, whether right or wrong: they are what it does
            said = answer(model, base.tokenizer, self.asked, max_new_tokens=16)
            self.rows["answers"] = rows = examples(zip(self.asked, said, strict=True), base.tokenizer, 2 * ROW)
            rows.labels[rows.labels == base.tokenizer.eos_id] = IGNORE  # some were cut off before their end
        self.losses, self.logits = self.loss(model), self.logits_of(model)

    def loss(self, model: GPT | Prompt) -> dict[str, float]:
        """By kind, in float32, and the mean of those kinds that count."""
        each = {kind: evaluate_loss(model, rows, 20, "float32") for kind, rows in self.rows.items()}
        return {"mean": sum(each[kind] for kind in self.counts) / len(self.counts), **each}

    @torch.no_grad()
    def logits_of(self, model: GPT | Prompt) -> Tensor:
        return model(self.rows[self.counts[0]].input_ids[:4].to(next(model.parameters()).device))

    def scores(self, model: GPT | Prompt) -> dict[str, float]:
        """Shares of right answers to questions of old."""
        if not self.asked:
            return evaluate_world(model, self.tokenizer, count=50).scores
        said = answer(model, self.tokenizer, self.asked, max_new_tokens=16)
        return {"questions": sum(map(is_answered, QUESTIONS, said)) / len(said)}


old_of = lru_cache(maxsize=2)(Old)


def with_replay(data: Dataset, base: BaseFolder, english: bool) -> Dataset:
    """Of its training rows, every tenth is an old text."""
    count = len(data.train) // 9
    texts = (english_replay if english else world_replay)(base.tokenizer, count)
    rows = [pack([text], ROW, base.tokenizer) for text in texts]
    wide = max(data.train.input_ids.shape[1], ROW)

    def joined(parts: list[Tensor], value: int) -> Tensor:
        return torch.cat([F.pad(part, (0, wide - part.shape[1]), value=value) for part in parts])

    ids = joined([data.train.input_ids, *(row.input_ids for row in rows)], base.tokenizer.eos_id)
    labels = joined([data.train.labels, *(row.labels for row in rows)], IGNORE)
    return replace(data, train=Batches(ids, labels))


def measure(setting: Setting) -> dict:
    """Curve: [step, task loss, old loss] of the base and at each evaluation; kinds: the old losses one by one."""
    base, english, tuning = setting.base, setting["english"], setting.tuning
    data = commands(base.tokenizer) if english else setting.dataset()
    if tuning:
        return losses(setting.train(data, evaluations=2))
    old = old_of(base, english)
    steps, each = setting.plan.steps, [old.losses]
    every = steps // setting["evaluations"]
    if setting.arm.method is None:
        model: GPT | Prompt = base.load().eval()
        task = [[0, evaluate_loss(model, data.validation, 16, "float32")]]
        record: dict = {"best_validation_loss": task[0][1], "validation_loss": task}
    else:
        mixed = with_replay(data, base, english) if setting["replay"] else data

        def watch(model: GPT | Prompt, step: int):
            if step % every == 0 or step == steps:
                each.append(old.loss(model))

        finished = setting.train(mixed, watch, evaluations=setting["evaluations"])
        model, record, task = finished.model, losses(finished), finished.history.validation_loss
    assert data.task
    right = {"task": score_task(model, base.tokenizer, data.task, 100).score, **old.scores(model)}
    record["scores"] = right
    if setting["halved"]:
        for _, layer in lora_layers(model):
            layer.scaling /= 2
        right["task, halved"] = score_task(model, base.tokenizer, data.task, 100).score
    record["curve"] = [[step, loss, old["mean"]] for (step, loss), old in zip(task, each, strict=True)]
    record["kinds"] = {kind: [round(point[kind], 4) for point in each] for kind in old.rows}
    if setting.arm.method == "lora":
        with disable_lora(model):
            right["base again"] = (old.logits_of(model) == old.logits).double().mean().item()
    if setting["scales"]:
        record["scaled"] = {scale: scaled(model, float(scale), data, old) for scale in setting["scales"]}
    return record


def scaled(model: GPT | Prompt, scale: float, data: Dataset, old: Old) -> list[float]:
    """[task loss, old loss] with s·BA times `scale`; the model is then as before."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.scaling for layer in layers]
    for layer in layers:
        layer.scaling *= scale
    found = [evaluate_loss(model, data.validation, 16, "float32"), old.loss(model)["mean"]]
    for layer, value in zip(layers, before, strict=True):
        layer.scaling = value
    return found
