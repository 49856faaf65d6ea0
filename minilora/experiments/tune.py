"""Each method's learning rate, chosen on a grid with a seed that is not among those compared."""

from collections.abc import Callable
from dataclasses import replace

from minilora.experiments.methods import Experiment
from minilora.experiments.run import LEARNING_RATES, is_wide, rates_key, read_rates, run
from minilora.storage.files import write_json
from minilora.storage.locks import locked
from minilora.train_settings import NonFiniteError

# Each rate is about three times the one before. LoRA's best rate is said to lie about ten times above that of full
# fine-tuning; on the shipped base it was one to three times. LoRA+'s rate is A's, and PiSSA starts with large factors,
# so both begin lower; trained embeddings and keys need far larger steps. A wide base is offered a third of everything,
# and a tenth of full fine-tuning's grid, which LoRA+ and PiSSA share.
GRIDS = {"full": [1e-3, 3e-3, 1e-2], "lora": [3e-3, 1e-2, 3e-2], "prompt": [3e-2, 1e-1, 3e-1]}
WIDE_GRIDS = {"full": [1e-4, 3e-4, 1e-3], "lora": [1e-3, 3e-3, 1e-2], "prompt": [1e-2, 3e-2, 1e-1]}
GRID_OF = {"full": "full", "lora+": "full", "pissa": "full", "soft-prompt": "prompt", "prefix": "prompt"}  # else lora's
TUNING_SEED = 1000  # not one of the seeds that are compared


def grid_of(method: str, wide: bool = False) -> list[float]:
    """Where the search begins for a method; wide: on a base as wide as SmolLM2."""
    return WIDE_GRIDS[GRID_OF.get(method, "lora")] if wide else GRIDS[GRID_OF.get(method, "lora")]


def tune(experiments: list[Experiment], progress: bool = True) -> dict:
    """Tries each experiment with its method's grid of learning rates, and with TUNING_SEED in place of its own seed.

    Stores the choices for the experiments' base and data in LEARNING_RATES and returns them by method. Raises
    ValueError if a method diverges at every rate, and for a file of rates that holds something else.
    """
    chosen = {}
    if LEARNING_RATES.exists():
        read_rates(LEARNING_RATES)  # a fault in it is better said before the runs
    for experiment in experiments:

        def loss_at(rate: float, experiment=experiment) -> float | None:
            training = replace(experiment.training, learning_rate=rate, seed=TUNING_SEED)
            try:
                return run(replace(experiment, training=training), progress=progress).history.best_validation_loss
            except NonFiniteError:  # diverged: out of the question
                return None

        method, key = experiment.method, rates_key(experiment.dataset.name, experiment.base)
        losses = search(loss_at, grid_of(method, is_wide(experiment.base)))
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not finite:
            raise ValueError(f"{method} diverged at every rate of its grid, {', '.join(map(str, losses))}")
        chosen[method] = {
            "grid": [{"learning_rate": rate, "validation_loss": losses[rate]} for rate in sorted(losses)],
            "chosen": min(finite, key=lambda rate: finite[rate]),
            "steps": experiment.training.steps,
            "batch_size": experiment.training.batch_size,
            "seed": TUNING_SEED,
            **experiment.method_settings,
        }
        with locked(LEARNING_RATES):  # another search may store its own between reading and writing
            choices = read_rates(LEARNING_RATES) if LEARNING_RATES.exists() else {}
            choices[key] = choices.get(key, {}) | {method: chosen[method]}
            write_json(LEARNING_RATES, choices)
    return chosen


def search(
    loss_at: Callable[[float], float | None], grid: list[float], finer: bool = False
) -> dict[float, float | None]:
    """The loss at every rate of the grid and, by the same factor, beyond its ends; None where the run diverged.

    A choice at an end says only on which side the best rate lies. So the grid is extended until both neighbours of the
    best are worse. finer: at last the two rates halfway between the best and its neighbours are tried as well, which
    makes steps of about 1.7 of those of 3.
    """
    losses = {rate: loss_at(rate) for rate in grid}
    while finite := {rate: loss for rate, loss in losses.items() if loss is not None}:
        best = min(finite, key=lambda rate: finite[rate])
        if min(losses) < best < max(losses):
            break
        inside = sorted(losses)[1 if best == min(losses) else -2]
        further = float(f"{best**2 / inside:.0e}")  # one digit: 1e-2, 3e-3
        losses[further] = loss_at(further)
    if finer and finite:
        tried = sorted(losses)
        at = tried.index(best)
        for low, high in zip(tried[at - 1 : at + 1], tried[at : at + 2], strict=True):
            between = float(f"{(low * high) ** 0.5:.1e}")
            losses[between] = loss_at(between)
    return losses
