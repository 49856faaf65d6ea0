"""What one run of the claims about few bits does: round a base, once, and train LoRA on the floats that are left.

QLoRA keeps the codes and makes the same floats anew at every step, which saves memory and takes time. Which floats the
base has is all that matters for what is learned, so here they are made once, and every arm's steps are plain LoRA's.
"""

from collections.abc import Mapping
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.inject import apply_lora, lora_layers
from minilora.adapters.starts import loftq
from minilora.config import LoRAConfig, lora_scaling
from minilora.experiments.bench_model import english_rows
from minilora.experiments.bench_ratios import ModelBenchSettings
from minilora.experiments.claims.claim import interval
from minilora.experiments.claims.study import Setting
from minilora.experiments.claims.uses.basics import directions
from minilora.experiments.looks import BLACK, BLUE, DARK, SMALL, legend_below, new_figure, titled
from minilora.experiments.methods import BaseFolder
from minilora.experiments.pictures import Figure, redrawable
from minilora.experiments.run import schedule
from minilora.inference.evaluate import score_task
from minilora.linear4bit import dequantize_model, float_linears, quantize_model
from minilora.model import GPT
from minilora.quant import Quantization, dequantize
from minilora.text.batches import Batches
from minilora.text.datasets import Dataset
from minilora.text.tokenizer import AnyTokenizer
from minilora.train import train

R, ALPHA = 8, 16
HELD_OUT = 64  # rows of 128 tokens


@lru_cache(maxsize=2)
def english(tokenizer: AnyTokenizer) -> Dataset:
    """Documentation of the standard library in rows of 128 tokens: the last are held out, the others for training."""
    rows = english_rows(tokenizer, ModelBenchSettings(text_rows=400, text_length=128))
    train, validation = (
        Batches(rows.input_ids[part], rows.labels[part]) for part in (slice(-HELD_OUT), slice(-HELD_OUT, None))
    )
    return Dataset("english", train, validation, None, None, [], training={"batch_size": 8})


def data_of(setting: Setting) -> Dataset:
    return english(setting.base.tokenizer) if setting.plan.data == "english" else setting.dataset()


def best_of_rank(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B of `starts.pissa`, by eigenvalues of W Wᵀ, which a GPU finds many times faster than an SVD."""
    _, L, R = directions(W)  # (out, n), (n, in): one of them orthonormal, the other with the singular values in it
    L, R = L[:, :r], R[:r]
    even = (R.norm(dim=1) / L.norm(dim=0)).sqrt()  # (r,)
    return R / (even[:, None] * scaling**0.5), L * (even / scaling**0.5)


@lru_cache(maxsize=1)  # some minutes' work for a real model, and the same for every seed
def loftq_start(base: BaseFolder, quantization: Quantization) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By layer: the rounded weight as floats, A, B."""
    scaling, starts = lora_scaling(R, ALPHA), {}
    for name, linear in float_linears(base.load()).items():
        quantized, A, B, _ = loftq(linear.weight.detach(), R, scaling, quantization, best_of_rank=best_of_rank)
        starts[name] = dequantize(quantized), A, B
    return starts


@torch.no_grad()
def adapted(setting: Setting) -> GPT:
    """The base with its block linears rounded as the arm says, and LoRA on all of them."""
    model, quantization = setting.base.load(), setting["base"]
    starts = loftq_start(setting.base, quantization) if setting["loftq"] else {}
    if quantization is not None and not starts:
        dequantize_model(quantize_model(model, quantization))
    apply_lora(model, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"))
    for name, layer in lora_layers(model):
        if name in starts:
            for parameter, value in zip(
                (layer.base_layer.weight, layer.lora_A, layer.lora_B), starts[name], strict=True
            ):
                parameter.copy_(value)
    return model


def measure(setting: Setting) -> dict[str, Any]:
    """The validation loss before and after training and, of a task, the share of right answers."""
    data = data_of(setting)
    assert setting.rate
    training = {"batch_size": data.training["batch_size"], "evaluations": 1, "precision": "float32"}
    config = schedule(setting.plan.steps, setting.rate, seed=setting.seed, **training)
    torch.manual_seed(setting.seed)  # of the random start of A, the same in all arms
    model = adapted(setting)
    history = train(model, data.train, config, data.validation, progress=setting.progress)
    record: dict[str, Any] = {
        "best_validation_loss": history.best_validation_loss,
        "validation_loss": history.validation_loss,
    }
    if data.task and not setting.tuning:
        record["scores"] = {"task": score_task(model, setting.base.tokenizer, data.task).score}
    return record


@redrawable
def above_floats(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """How far each arm's loss lies above that of the floats, nats per token, paired by seed: before training and after,
    a dot a seed, the mean and its 90 % interval."""
    reference = runs.get("floats", {})  # without runs before its turn has come
    arms = [arm for arm in runs if arm != "floats" and set(runs[arm]) & set(reference)]
    figure, (axes,) = new_figure(height=1.4 + 0.34 * len(arms))
    for at, (label, colour, marker, shift) in {
        0: ("before training", DARK, "s", -0.17),
        -1: ("after", BLUE, "o", 0.17),
    }.items():
        for place, arm in enumerate(arms):
            floats = {seed: reference[seed] for seed in runs[arm] if seed in reference}
            rises = [
                runs[arm][seed]["validation_loss"][at][1] - one["validation_loss"][at][1]
                for seed, one in floats.items()
            ]
            look: dict[str, Any] = {"color": colour, "marker": marker}
            axes.scatter(rises, [place + shift] * len(rises), s=14, alpha=0.6, label="" if place else label, **look)
            if len(rises) > 1:
                low, mean, high = interval(rises)
                axes.errorbar(mean, place + shift, xerr=[[mean - low], [high - mean]], color=BLACK, capsize=3)
            axes.annotate(
                f"{fmean(rises):+.3f}",
                (1.02, place + shift),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=SMALL,
                color=colour,
            )
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    titled(axes, title)
    axes.set(xlabel="loss above that of the floats (nats/token)")
    if arms:
        legend_below(figure, axes)
    return figure
