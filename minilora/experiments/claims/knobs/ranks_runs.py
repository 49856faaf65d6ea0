"""One run of the studies of ranks and layers, and the bytes of a step."""

from dataclasses import replace

import torch

from minilora.adapters.inject import count_parameters
from minilora.adapters.prompts import Prompt
from minilora.experiments.claims.study import Setting, loss_of, losses
from minilora.experiments.claims.uses.costs import GB, lora_of, shape_of
from minilora.experiments.claims.uses.data_runs import train_loss
from minilora.experiments.simulate import simulate
from minilora.inference.evaluate import score_task
from minilora.model import GPT
from minilora.text.batches import Batches
from minilora.text.commands import commands
from minilora.text.datasets import Dataset

HELD_OUT = 200


def measure(setting: Setting) -> dict:
    """The losses of a run, at its best and at its end, the numbers that it trained, and the share of right answers."""
    setting, data = placed(setting), data_of(setting)
    if setting.arm.method is None:
        model: GPT | Prompt = setting.base.load()
        loss = loss_of(model, data.validation)
        record: dict = {"best_validation_loss": loss, "last_validation_loss": loss}
    else:
        steps, evaluations = setting.plan.steps * setting["times"], 2 if setting.tuning else setting["evaluations"]
        finished = setting.train(data, steps=steps, batch_size=setting["batch"], evaluations=evaluations)
        model, record = finished.model, losses(finished)
        record |= {"last_validation_loss": record["validation_loss"][-1][1], "train_loss": train_loss(finished)}
        record["trained"] = count_parameters(model)[0]
    if data.task and not setting.tuning:
        right = score_task(model, setting.base.tokenizer, data.task, setting["asked"])
        record["scores"] = {"task": right.score}
    return record


def placed(setting: Setting) -> Setting:
    """An arm with a "third", 0 the first and 2 the last, has adapters on all linears of a third of the layers."""
    third = setting.arm.settings.get("third")
    if third is None:
        return setting
    count = shape_of(setting).num_hidden_layers
    layers = range(count * third // 3, count * (third + 1) // 3)
    targets = rf"model\.layers\.({'|'.join(map(str, layers))})\..*"
    return replace(setting, arm=replace(setting.arm, lora={**setting.arm.lora, "target_modules": targets}))


def data_of(setting: Setting) -> Dataset:
    """The plan's data; where it says how many examples, so many of the training rows, others for each seed."""
    wanted = setting.plan.data == "commands"
    data = commands(setting.base.tokenizer, validation=HELD_OUT) if wanted else setting.dataset()
    if (count := setting["examples"]) is None:
        return data
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(setting.seed))[:count]
    return replace(data, train=Batches(data.train.input_ids[rows], data.train.labels[rows]))


def bytes_of_a_step(setting: Setting) -> dict:
    """GB of tensors at the peak of one training step, on fake tensors, and the numbers that are trained."""
    lora, step = lora_of(placed(setting)), setting["step"]
    report = simulate(shape_of(setting), "lora", r=lora.r, target_modules=lora.target_modules, **step)
    scores = {"peak, GB": report.peak / GB, "trained, million": report.trainable_parameters / 1e6}
    return {"scores": scores, "step": report.title}
