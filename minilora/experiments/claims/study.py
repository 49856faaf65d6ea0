"""A study: arms that are trained and measured alike, at one scale or two. Several claims may rest on one study."""

import datetime
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.prompts import Prompt
from minilora.config import LoRAConfig
from minilora.experiments import figures
from minilora.experiments.methods import BaseFolder, Experiment
from minilora.experiments.pictures import Figure
from minilora.experiments.run import BASE, Run, run, schedule
from minilora.experiments.tune import TUNING_SEED
from minilora.inference.evaluate import score_task
from minilora.model import GPT
from minilora.text.datasets import Dataset, data_named, load_dataset
from minilora.text.tasks import TASKS
from minilora.train import evaluate_loss
from minilora.train_settings import CROSS_ENTROPY, NonFiniteError, Objective, Rows

Draw = Callable[[str, Mapping[str, Mapping[int, Mapping]]], Figure]  # of a title, and of runs by arm and by seed
ROW = 128  # tokens of a row of text, and of an example at most
# By scale. Of what is too large for this machine the shape alone is used, which a plan names; no base is read.
BASES: dict[str, str | Path] = {"tiny": BASE, "smollm2": "smollm2", "large": BASE}


@dataclass(frozen=True)
class Arm:
    """One of the things compared. Its learning rate is its own, from a search, or `rate_times` that of another arm.

    method: None for the base as it is, which has no rate. lora: the fields of LoRAConfig that are not the study's
    default. settings: what else the study's `measure` wants to know.
    """

    method: str | None
    lora: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    rate_times: float = 1


@dataclass(frozen=True)
class Plan:
    """How a study is run at one scale. What is changed here makes the stored runs those of another plan."""

    data: str
    steps: int
    seeds: int
    minutes: float  # of a run, on two cores
    settings: dict[str, Any] = field(default_factory=dict)  # as an arm's


@dataclass(frozen=True)
class Setting:
    """What one run is a function of."""

    base: BaseFolder
    plan: Plan
    arm: Arm
    rate: float | None
    seed: int
    progress: bool = True

    @property
    def tuning(self) -> bool:
        """Whether the run only chooses a rate: no more than its validation loss is wanted."""
        return self.seed == TUNING_SEED

    def __getitem__(self, name: str) -> Any:
        """A setting of the arm, or else of the plan."""
        return (self.plan.settings | self.arm.settings)[name]

    def dataset(self) -> Dataset:
        return dataset(self.plan.data, self.base)

    def train(self, data: Dataset, watch: Callable[[GPT | Prompt, int], None] | None = None, **training) -> Run:
        """A run of the arm's method on `data`, in float32 on any device.

        watch: as in `run`; training: fields of TrainConfig.
        """
        assert self.arm.method and self.rate
        settings = {"precision": "float32", **data.training, "steps": self.plan.steps, **training}
        config = schedule(learning_rate=self.rate, seed=self.seed, **settings)
        lora = LoRAConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **self.arm.lora})
        return run(Experiment(self.base, data, self.arm.method, config, lora), progress=self.progress, watch=watch)


@lru_cache(maxsize=4)
def dataset(name: str, base: BaseFolder) -> Dataset:
    return load_dataset(name if name in TASKS else data_named(name), base.tokenizer, ROW)


def train_and_score(setting: Setting, **training) -> dict:
    """The validation loss of the arm on the plan's data and, where the data is a task, the share of right answers.

    training: fields of TrainConfig.
    """
    data = setting.dataset()
    finished = setting.train(data, **training)
    record: dict[str, Any] = losses(finished)
    if data.task and not setting.tuning:
        record["scores"] = {"task": score_task(finished.model, setting.base.tokenizer, data.task).score}
    return record


def loss_of(model: Any, rows: Rows, objective: Objective = CROSS_ENTROPY) -> float:
    """The mean loss over the rows, in float32 on any device: by default in nats a token."""
    return evaluate_loss(model, rows, 50, "float32", objective)


def losses(finished: Run) -> dict[str, Any]:
    history = finished.history
    return {"best_validation_loss": history.best_validation_loss, "validation_loss": history.validation_loss}


def paired_losses(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """The losses of all arms, by seed."""
    by_arm = {arm: {seed: record["best_validation_loss"] for seed, record in of.items()} for arm, of in runs.items()}
    return figures.paired_losses(by_arm, title)


@dataclass(frozen=True, eq=False)
class Study:
    """measure: one run's record. Of a tuning run only `chosen_by` is wanted, which is lowest at the best rate.

    finer: rates are chosen in steps of 1.7 and not of 3.
    """

    name: str
    about: str  # what is trained on what, and what is measured, in one line
    arms: dict[str, Arm]
    plans: dict[str, Plan]  # by scale: "tiny" is the shipped base, "smollm2" the real model, "large" a shape alone
    measure: Callable[[Setting], dict] = train_and_score
    chosen_by: str = "best_validation_loss"
    figure: Draw = paired_losses
    finer: bool = False


def timed(study: Study, setting: Setting) -> dict:
    """The record of one run, with how long it took, when and where; its loss is None where it diverged while tuning.

    The date is that of the run's end, a day and no time: it tells runs of one day from those of another, and not which
    of two runs of a day came first, nor whether a rule that is of the same day was written before them.
    """
    began = time.perf_counter()
    try:
        record = study.measure(setting)
    except NonFiniteError:
        if not setting.tuning:
            raise
        record = {study.chosen_by: None}
    where = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    processor = platform.processor() or platform.machine()
    if setting.base.device == "cuda":
        processor = torch.cuda.get_device_name()
    return {
        **record,
        "method": setting.arm.method,
        "steps": setting.plan.steps,
        "seconds": round(time.perf_counter() - began, 1),
        "date": datetime.date.today().isoformat(),
        "environment": {**where, "processor": processor, "device": setting.base.device},
    }
