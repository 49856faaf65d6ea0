"""What a step of DPO costs above one of cross entropy on the same rows: bytes, counted exactly, and time."""

import statistics
from typing import Any

from minilora.adapters.inject import apply_lora
from minilora.config import LoRAConfig
from minilora.dtypes import DTYPES
from minilora.experiments.claims.study import ROW, Setting
from minilora.experiments.claims.uses.costs import GB, shape_of
from minilora.experiments.simulate import count_base_parameters, simulate
from minilora.experiments.timing import Timing, ratios_in_turn
from minilora.objectives import Preference, with_reference
from minilora.rows import batch_of
from minilora.text.batches import Batches
from minilora.text.preferences import load_preferences
from minilora.train import make_optimizer, training_step
from minilora.train_settings import CROSS_ENTROPY, Objective, TrainConfig


def bytes_of_a_step(setting: Setting) -> dict[str, Any]:
    """The peak above that of cross entropy on as many rows, percent of the model's weights. With full fine-tuning the
    reference is computed beforehand; with an adapter it is the model with the adapter off, or a second model."""
    shape, step = shape_of(setting), setting.plan.settings["step"]
    more = dict(sequence_length=step["length"], dtype=step["dtype"], target_modules="all-linear")
    plain = simulate(shape, setting["method"], batch_size=2 * step["pairs"], **more)
    dpo = simulate(shape, setting["method"], batch_size=step["pairs"], objective="dpo", **more)
    base = count_base_parameters(shape) * DTYPES[step["dtype"]].itemsize
    above = dpo.peak - plain.peak + (base if setting["second"] else 0)
    scores = {"above, % of weights": 100 * above / base, "above, GB": above / GB, "SFT's peak, GB": plain.peak / GB}
    return {"scores": scores, "step": dpo.title}


def time_of_a_step(setting: Setting) -> dict[str, Any]:
    """Of some pairs, in turn: the median over the time of cross entropy on the same rows, twice as many, percent."""
    base, count = setting.base, setting["pairs"]
    every = load_preferences(setting.plan.data, base.tokenizer, ROW, 1).train
    pairs = Batches(every.input_ids[:count], every.labels[:count])
    config = TrainConfig(1, count, 1e-4, precision="float32", seed=setting.seed)
    goals: dict[str, tuple[Any, Objective]] = {
        "sft": (pairs, CROSS_ENTROPY),
        "beforehand": (with_reference(pairs, base.load()), Preference()),
        "adapter off": (pairs, Preference()),
    }

    def step_of(data: Any, objective: Objective):
        model = apply_lora(base.load(), LoRAConfig(8, 16, target_modules="all-linear"))
        optimizer = make_optimizer(model, config)
        ids, labels, *known = batch_of(data, 0, config)
        if objective is CROSS_ENTROPY:
            ids, labels = ids.flatten(0, 1), labels.flatten(0, 1)
        return lambda: training_step(model, optimizer, ids, labels, config, None, objective, known)

    actions = {name: step_of(*goal) for name, goal in goals.items()}
    ratios = ratios_in_turn(actions, Timing(setting["rounds"], progress=False), "step")
    return {"scores": {name: 100 * statistics.median(each) for name, each in ratios.items()}}
