"""The ledger: all claims, the runs that are stored for them, and the verdicts computed from these.

Each arm gets a learning rate of its own, from a grid that goes on until both neighbours of the best are worse, with a
seed that is not reported. Every run is stored as it ends, in data/claims/STUDY.SCALE.json, so a kill costs one run.
"""

import json
from pathlib import Path

from minilora.experiments.claims import variants
from minilora.experiments.claims.claim import Claim, Finding, Runs, summary
from minilora.experiments.claims.study import BASES, Setting, Study, timed
from minilora.experiments.run import DATA, open_base
from minilora.experiments.tune import TUNING_SEED, grid_of, search
from minilora.storage.files import naming, read_json, replacing
from minilora.storage.locks import locked
from minilora.train_settings import NonFiniteError

FAMILIES = (variants,)
CLAIMS = {claim.name: claim for family in FAMILIES for claim in family.CLAIMS}
STUDIES = {study.name: study for claim in CLAIMS.values() for study in claim.studies}
FOLDER = DATA / "claims"


def find(name: str, scale: str | None = None) -> tuple[Claim, list[Study]]:
    """The claim and its studies at that scale, or at any. ValueError for a claim that is not in the ledger, and for a
    scale at which it is not studied."""
    if name not in CLAIMS:
        raise ValueError(f"there is no claim {name!r}; the ledger has {', '.join(CLAIMS)}")
    claim = CLAIMS[name]
    studies = [study for study in claim.studies if scale is None or scale in study.plans]
    if not studies:
        scales = sorted({scale for study in claim.studies for scale in study.plans})
        raise ValueError(f"claim {name} is not studied at scale {scale}; it is at {', '.join(scales)}")
    return claim, studies


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
            runs[record["arm"]][record["seed"]] = record
    return runs


def finding(claim: Claim, study: Study, scale: str) -> Finding | None:
    """The verdict from what is stored; None before there are two seeds of each arm."""
    runs = reported(study, scale)
    return claim.rule.decide(runs) if min(len(runs[arm]) for arm in claim.rule.arms) > 1 else None


def run_claim(
    name: str, scale: str = "tiny", seeds: int | None = None, device: str = "cpu", progress: bool = True
) -> None:
    """Makes the runs that are not stored yet, seeds 0, 1, ... of each arm of the claim's rule, in all its studies.

    Raises ValueError as `find`, and for an arm that diverges at every rate of its grid.
    """
    claim, studies = find(name, scale)
    for study in studies:
        run_study(study, scale, claim.rule.arms, seeds, device, progress)


def run_study(study: Study, scale: str, arms: tuple[str, ...], seeds: int | None, device: str, progress: bool):
    plan, base = study.plans[scale], open_base(BASES[scale], device)

    def record_of(arm: str, rate: float | None, seed: int) -> dict:
        wanted = arm, rate, seed
        found = [r for r in stored(study, scale) if (r["arm"], r["learning_rate"], r["seed"]) == wanted]
        if found:
            return found[0]
        setting = Setting(base, plan, study.arms[arm], rate, seed, progress)
        try:
            record = timed(study, setting)
        except NonFiniteError:
            if not setting.tuning:
                raise
            record = {"method": study.arms[arm].method, "steps": plan.steps, study.chosen_by: None}
        record = {"arm": arm, "learning_rate": rate, "seed": seed, **record}
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

        tried = search(loss_at, grid_of(what.method, scale != "tiny"))
        finite = {rate: loss for rate, loss in tried.items() if loss is not None}
        if not finite:
            raise ValueError(f"{arm} diverged at every rate of its grid, {', '.join(map(str, tried))}")
        return min(finite, key=lambda rate: finite[rate])

    for arm in arms:
        rate = rate_of(arm)
        for seed in range(plan.seeds if seeds is None else seeds):
            record_of(arm, rate, seed)


def cases(name: str, scale: str | None) -> list[tuple[Study, str]]:
    """Where a claim is studied: at that scale, or at all."""
    _, studies = find(name, scale)
    return [(study, at) for study in studies for at in study.plans if scale in (None, at)]


def draw(name: str, scale: str | None, folder: Path) -> list[Path]:
    """Writes a figure of the reported runs of each of the claim's studies that has any; returns their paths."""
    arms, paths = CLAIMS[name].rule.arms, []
    for study, at in cases(name, scale):
        runs = {arm: by_seed for arm, by_seed in reported(study, at).items() if arm in arms and by_seed}
        if runs:
            paths.append(folder / f"{name}.{study.name}.{at}.png")
            with replacing(paths[-1]) as temporary:
                study.figure(f"{name}: {study.about}", runs).savefig(temporary, dpi=150)
    return paths


def table() -> str:
    """The ledger in Markdown: one row for each claim, and in it one line for each study and scale."""
    rows = [
        "| claim | who says it | verdict | the number that decides (90 % interval) | seeds |",
        "|---|---|---|---|---|",
    ]
    for claim in CLAIMS.values():
        found = {case: finding(claim, *case) for case in cases(claim.name, None)}
        done = [each for each in found.values() if each]
        lines = [f"{where(*case)}: {said(each, len(done) > 1)}" for case, each in found.items()]
        seeds = "<br>".join(str(each.seeds) if each else "" for each in found.values())
        what = f"| `{claim.name}`: {claim.sentence} | {claim.source} | {summary(done)} |"
        rows.append(f"{what} {'<br>'.join(lines)} | {seeds} |")
    return "\n".join(rows)


def where(study: Study, scale: str) -> str:
    return f"{study.name}, {scale}"


def said(found: Finding | None, with_verdict: bool) -> str:
    if found is None:
        return "not run"
    return f"{found.verdict}, {found.text()}" if with_verdict else found.text()


def details(name: str, scale: str | None = None) -> str:
    """A claim with its rule, and of each study the arms and every run that is stored."""
    claim, _ = find(name, scale)
    about = {"said by": claim.source, "statistic": claim.rule.statistic, "rule": claim.rule.words}
    lines = [claim.sentence, *(f"{key:<11}{value}" for key, value in about.items())]
    lines.append(f"{'objection':<11}{claim.objection}")
    for study, at in cases(name, scale):
        lines += ["", *runs_of(claim, study, at)]
    return "\n".join(lines)


def runs_of(claim: Claim, study: Study, scale: str) -> list[str]:
    """The lines on one study at one scale."""
    plan, found = study.plans[scale], finding(claim, study, scale)
    records = [record for record in stored(study, scale) if record["arm"] in claim.rule.arms]
    runs = f"{plan.steps} steps, {plan.seeds} seeds, about {plan.minutes:g} minutes a run on two cores"
    names = list(dict.fromkeys(name for record in records for name in record.get("scores", {})))
    wide = max(map(len, claim.rule.arms))
    head = f"{'arm':<{wide}}{'rate':>9}{'seed':>6}{'loss':>10}" + "".join(f"{name:>{len(name) + 2}}" for name in names)
    lines = [f"{where(study, scale)}: {study.about}; {runs}", f"{head}{'seconds':>9}"]
    for record in records:
        loss, rate = record[study.chosen_by], record["learning_rate"]
        text = f"{record['arm']:<{wide}}{'' if rate is None else f'{rate:g}':>9}{record['seed']:>6}"
        text += f"{'diverged' if loss is None else f'{loss:.4f}':>10}"
        for name in names:
            value = record.get("scores", {}).get(name)
            text += f"{'' if value is None else f'{value:.3f}':>{len(name) + 2}}"
        kind = "  (chooses the rate)" if record["seed"] == TUNING_SEED else ""
        lines.append(f"{text}{record.get('seconds', ''):>9}{kind}")
    return [*lines, f"{found.verdict}: {found.text()}, {found.seeds} seeds" if found else "not run yet"]
