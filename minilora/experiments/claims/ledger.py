"""The ledger: all claims, the runs that are stored for them, and the verdicts computed from these.

Each arm gets a learning rate of its own, from a grid that goes on until both neighbours of the best are worse, with a
seed that is not reported. Every run is stored as it ends, in data/claims/NAME.SCALE.json, so a kill costs one run.
"""

import datetime
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from minilora.config import LoRAConfig
from minilora.experiments import figures
from minilora.experiments.claims import variants
from minilora.experiments.claims.claim import Arm, Claim, Finding, Plan
from minilora.experiments.methods import BaseFolder, Experiment
from minilora.experiments.run import BASE, DATA, open_base, run, schedule
from minilora.experiments.tune import TUNING_SEED, grid_of, search
from minilora.inference.evaluate import score_task
from minilora.storage.files import read_json, replacing, write_json
from minilora.storage.locks import locked
from minilora.text.datasets import Dataset, load_dataset
from minilora.train_settings import NonFiniteError

CLAIMS = {claim.name: claim for claim in variants.CLAIMS}
FOLDER = DATA / "claims"
RUN = "learning_rate", "seed", "environment"  # with its arm and plan, what a run is a function of
ROW = 128  # tokens of a row of text, and of an example at most
BASES: dict[str, str | Path] = {"tiny": BASE, "smollm2": "smollm2"}


def find(name: str, scale: str) -> tuple[Claim, Plan]:
    """ValueError for a claim that is not in the ledger, and for a scale at which it is not run."""
    if name not in CLAIMS:
        raise ValueError(f"there is no claim {name!r}; the ledger has {', '.join(CLAIMS)}")
    if scale not in CLAIMS[name].plans:
        raise ValueError(f"claim {name} is not run at scale {scale}; it is at {', '.join(CLAIMS[name].plans)}")
    return CLAIMS[name], CLAIMS[name].plans[scale]


def file_of(claim: Claim, scale: str) -> Path:
    return FOLDER / f"{claim.name}.{scale}.json"


def stored(claim: Claim, scale: str) -> list[dict]:
    """The records of the runs so far: arm, seed, learning_rate, losses. Those with TUNING_SEED chose the rates.

    Raises ValueError for runs of another plan than the claim's.
    """
    path, steps = file_of(claim, scale), claim.plans[scale].steps
    records = read_json(path)["runs"] if path.is_file() else []
    for record in records:
        if record["arm"] not in claim.arms or record["steps"] != steps:
            what = f"a run of {record['arm']} with {record['steps']} steps"
            raise ValueError(f"{path} holds {what}, which is not in the claim's plan; remove the file to run it anew")
    return records


def finding(claim: Claim, scale: str) -> Finding | None:
    """The verdict from what is stored; None before there are two seeds of each arm."""
    runs: dict[str, dict[int, dict]] = {arm: {} for arm in claim.arms}
    for record in stored(claim, scale):
        if record["seed"] != TUNING_SEED:
            runs[record["arm"]][record["seed"]] = record
    return claim.rule.decide(runs) if min(map(len, runs.values())) > 1 else None


def run_claim(
    name: str, scale: str = "tiny", seeds: int | None = None, device: str = "cpu", progress: bool = True
) -> Finding | None:
    """Makes the runs that are not stored yet, seeds 0, 1, ... of each arm, and returns the verdict.

    Raises ValueError as `find`, and for an arm that diverges at every rate of its grid.
    """
    claim, plan = find(name, scale)
    base = open_base(BASES[scale], device)
    data = load_dataset(plan.data, base.tokenizer, ROW)

    def same_runs(what: Arm, *wanted) -> Iterator[dict]:
        """Of other claims: one machine gives an equal arm the same run again, on the same data with as many steps."""
        for other in CLAIMS.values():
            if scale in other.plans and (other.plans[scale].data, other.plans[scale].steps) == (plan.data, plan.steps):
                for record in stored(other, scale):
                    if (other.arms[record["arm"]], *(record[key] for key in RUN)) == (what, *wanted):
                        yield record

    def record_of(arm: str, rate: float, seed: int) -> dict:
        for record in stored(claim, scale):
            if (record["arm"], record["learning_rate"], record["seed"]) == (arm, rate, seed):
                return record
        same = list(same_runs(claim.arms[arm], rate, seed, environment(device)))
        record = same[0] if same else measure(base, data, claim.arms[arm], plan.steps, rate, seed, progress)
        with locked(file_of(claim, scale)):
            records = [*stored(claim, scale), {**record, "arm": arm, "seed": seed, "learning_rate": rate}]
            write_json(file_of(claim, scale), {"claim": name, "scale": scale, "data": plan.data, "runs": records})
        return record

    for arm, what in claim.arms.items():

        def loss_at(rate: float, arm=arm) -> float | None:
            return record_of(arm, rate, TUNING_SEED)["best_validation_loss"]

        losses = search(loss_at, grid_of(what.method, scale != "tiny"))
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not finite:
            raise ValueError(f"{arm} diverged at every rate of its grid, {', '.join(map(str, losses))}")
        rate = min(finite, key=lambda rate: finite[rate])
        for seed in range(plan.seeds if seeds is None else seeds):
            record_of(arm, rate, seed)
    return finding(claim, scale)


def measure(base: BaseFolder, data: Dataset, arm: Arm, steps: int, rate: float, seed: int, progress: bool) -> dict:
    """One run as a record. A tuning run is not scored, and has the loss None where it diverges."""
    training = schedule(**data.training | {"steps": steps}, learning_rate=rate, seed=seed)
    lora = LoRAConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **arm.lora})
    experiment = Experiment(base, data, arm.method, training, lora)
    began = time.perf_counter()
    record: dict = {"method": arm.method, "steps": steps, "best_validation_loss": None, "score": None}
    try:
        finished = run(experiment, progress=progress)
        record |= {"best_validation_loss": finished.history.best_validation_loss}
        record |= {"validation_loss": finished.history.validation_loss}
        if data.task and seed != TUNING_SEED:
            record["score"] = score_task(finished.model, base.tokenizer, data.task).score
    except NonFiniteError:
        if seed != TUNING_SEED:
            raise
    today = datetime.date.today().isoformat()
    return {
        **record,
        "seconds": round(time.perf_counter() - began, 1),
        "date": today,
        "environment": environment(base.device),
    }


def environment(device: str) -> dict[str, str | int]:
    machine: dict[str, str | int] = {"torch": torch.__version__, "python": platform.python_version()}
    processor = platform.processor() or platform.machine()
    return machine | {"threads": torch.get_num_threads(), "processor": processor, "device": device}


def draw(name: str, scale: str, folder: Path) -> Path | None:
    """Writes the figure of a claim's reported runs to the folder; None where there are none."""
    claim, plan = find(name, scale)
    runs = [record for record in stored(claim, scale) if record["seed"] != TUNING_SEED]
    if not runs:
        return None
    losses = {arm: {r["seed"]: r["best_validation_loss"] for r in runs if r["arm"] == arm} for arm in claim.arms}
    path = folder / f"{name}.{scale}.png"
    with replacing(path) as temporary:
        figures.paired_losses(losses, f"{name}: {plan.data}, {plan.steps} steps").savefig(temporary, dpi=150)
    return path


def table() -> str:
    """The ledger in Markdown: one row for each claim and scale."""
    head = "| claim | who says it | scale | verdict | the number that decides (90 % interval) | seeds | date |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for claim in CLAIMS.values():
        for scale in claim.plans:
            found, records = finding(claim, scale), stored(claim, scale)
            what = f"| `{claim.name}`: {claim.sentence} | {claim.source} | {scale} |"
            date = max((record["date"] for record in records), default="")
            said = f"{found.verdict} | {found.text()} | {found.seeds}" if found else "not run | | "
            rows.append(f"{what} {said} | {date} |")
    return "\n".join(rows)


def details(name: str, scale: str = "tiny") -> str:
    """A claim with its arms, its rule and every run that is stored."""
    claim, plan = find(name, scale)
    records, found = stored(claim, scale), finding(claim, scale)
    runs = f"{plan.data}, {plan.steps} steps, {plan.seeds} seeds, about {plan.minutes} minutes on two cores"
    about = {"said by": claim.source, "statistic": claim.rule.statistic, "rule": claim.rule.words}
    about |= {"runs": runs, "objection": claim.objection}
    lines = [claim.sentence, *(f"{key:<11}{value}" for key, value in about.items()), ""]
    lines += [f"{'arm':<12}{'rate':>8}{'seed':>6}{'loss':>9}{'score':>8}{'seconds':>9}"]
    for record in records:
        loss, score = record["best_validation_loss"], record["score"]
        kind = " (chooses the rate)" if record["seed"] == TUNING_SEED else ""
        numbers = f"{'diverged' if loss is None else f'{loss:.4f}':>9}{'' if score is None else f'{score:.3f}':>8}"
        run_by = f"{record['arm']:<12}{record['learning_rate']:>8g}{record['seed']:>6}"
        lines.append(f"{run_by}{numbers}{record['seconds']:>9}{kind}")
    return "\n".join([*lines, "", f"{found.verdict}: {found.text()}, {found.seeds} seeds" if found else "not run yet"])
