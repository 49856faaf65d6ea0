"""The ledger: all claims, the runs that are stored for them, and the verdicts computed from these.

Each arm gets a learning rate of its own, from a grid that goes on until both neighbours of the best are worse, with a
seed that is not reported. Every run is stored as it ends, in data/claims/STUDY.SCALE.json, so a kill costs one run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from minilora.experiments.claims.claim import Claim, Finding, Runs
from minilora.experiments.claims.goals import preferences, rewards, teachers
from minilora.experiments.claims.knobs import automatic, bits, capacity, orders, ranks, rates, updates
from minilora.experiments.claims.study import BASES, Setting, Study, timed
from minilora.experiments.claims.together import merging, serving, wire
from minilora.experiments.claims.uses import (
    basics,
    combining,
    costs,
    data,
    facts,
    forgetting,
    prompting,
    speed,
    variants,
)
from minilora.experiments.pictures import Stored
from minilora.experiments.run import DATA, open_base
from minilora.experiments.tune import TUNING_SEED, grid_of, search
from minilora.storage.files import naming, read_json, replacing
from minilora.storage.locks import locked

USES = (basics, costs, speed, combining, variants, prompting, facts, data, forgetting)
KNOBS = (rates, ranks, capacity, updates, orders, bits, automatic)
GOALS = (preferences, rewards, teachers)
TOGETHER = (merging, serving, wire)
FAMILIES = USES + KNOBS + GOALS + TOGETHER
CLAIMS = {claim.name: claim for family in FAMILIES for claim in family.CLAIMS}
STUDIES = {study.name: study for claim in CLAIMS.values() for study in claim.studies}
FOLDER = DATA / "claims"


@dataclass(frozen=True)
class Case:
    """Where something is studied, and with which of the study's arms."""

    study: Study
    scale: str
    arms: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.study.name}, {self.scale}"


def find(name: str, scale: str | None = None) -> list[Case]:
    """Where a claim is studied at that scale, or at any; of a study, all of its arms.

    ValueError for a name that is neither a claim's nor a study's, and for a scale at which there is no plan.
    """
    if name not in CLAIMS and name not in STUDIES:
        raise ValueError(f"there is no claim {name!r}; the ledger has {', '.join(CLAIMS)}")
    claim = CLAIMS.get(name)
    studies = claim.studies if claim else (STUDIES[name],)
    scales = list(dict.fromkeys(at for study in studies for at in study.plans))
    if scale is not None and scale not in scales:
        raise ValueError(f"{name} is not studied at scale {scale}; it is at {', '.join(scales)}")
    return [
        Case(study, at, claim.rule.arms if claim else tuple(study.arms))
        for study in studies
        for at in study.plans
        if scale in (None, at)
    ]


def file_of(study: Study, scale: str) -> Path:
    return FOLDER / f"{study.name}.{scale}.json"


def stored(study: Study, scale: str) -> list[dict]:
    """The records of the runs so far: arm, seed, learning_rate, losses. Those with TUNING_SEED chose the rates.

    Raises ValueError for runs of another plan than the study's.
    """
    path, steps = file_of(study, scale), study.plans[scale].steps
    records = read_json(path)["runs"] if path.is_file() else []
    for record in records:
        if record["arm"] not in study.arms or record["steps"] != steps:
            what = f"a run of {record['arm']} with {record['steps']} steps"
            raise ValueError(f"{path} holds {what}, which is not in the study's plan; remove the file to run it anew")
    return records


def write(study: Study, scale: str, records: list[dict]):
    """One line a run."""
    path = file_of(study, scale)
    with naming(f"cannot write {path} as JSON"):
        runs = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    head = f'"study": "{study.name}", "scale": "{scale}", "data": "{study.plans[scale].data}"'
    with replacing(path) as temporary:
        temporary.write_text(f'{{{head}, "runs": [\n{runs}\n]}}\n', encoding="utf-8")


def reported(study: Study, scale: str) -> Runs:
    """The stored runs by arm and seed, without those that chose a rate."""
    runs: dict[str, dict[int, dict]] = {arm: {} for arm in study.arms}
    for record in stored(study, scale):
        if record["seed"] != TUNING_SEED:
            place = file_of(study, scale).stem, record["arm"], record["seed"]
            runs[record["arm"]][record["seed"]] = Stored(record, place)
    return runs


def finding(claim: Claim, case: Case) -> Finding | None:
    """The verdict from what is stored; None before all arms have two seeds in common, or one for an exact number."""
    runs, least = reported(case.study, case.scale), 1 if claim.rule.exact else 2
    return claim.rule.decide(runs) if len(claim.rule.seeds(runs)) >= least else None


def run_named(
    name: str, scale: str = "tiny", seeds: int | None = None, device: str = "cpu", progress: bool = True
) -> None:
    """Makes the runs that are not stored yet, seeds 0, 1, ... of each arm of a claim's rule, or of a study.

    Raises ValueError as `find`, and for an arm that diverges at every rate of its grid.
    """
    for case in find(name, scale):
        run_case(case, seeds, device, progress)


def run_case(case: Case, seeds: int | None, device: str, progress: bool):
    study, scale = case.study, case.scale
    plan, base = study.plans[scale], open_base(BASES[scale], device)

    def record_of(arm: str, rate: float | None, seed: int) -> dict:
        wanted = arm, rate, seed
        found = [r for r in stored(study, scale) if (r["arm"], r["learning_rate"], r["seed"]) == wanted]
        if found:
            return found[0]
        measured = timed(study, Setting(base, plan, study.arms[arm], rate, seed, progress))
        record = {"arm": arm, "learning_rate": rate, "seed": seed, **measured}
        with locked(file_of(study, scale)):
            records = [*stored(study, scale), record]
            write(study, scale, records)
        return record

    def rate_of(arm: str) -> float | None:
        what = study.arms[arm]
        if what.method is None:
            return None
        if what.rate_of is not None:
            other = rate_of(what.rate_of)
            return None if other is None else float(f"{other * what.rate_times:.2g}")

        def loss_at(rate: float) -> float | None:
            return record_of(arm, rate, TUNING_SEED)[study.chosen_by]

        tried = search(loss_at, grid_of(what.method, scale != "tiny"), study.finer)
        finite = {rate: loss for rate, loss in tried.items() if loss is not None}
        if not finite:
            raise ValueError(f"{arm} diverged at every rate of its grid, {', '.join(map(str, tried))}")
        return min(finite, key=lambda rate: finite[rate])

    for arm in case.arms:
        rate = rate_of(arm)
        for seed in range(plan.seeds if seeds is None else seeds):
            record_of(arm, rate, seed)
