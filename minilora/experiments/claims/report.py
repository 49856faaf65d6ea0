"""The ledger on paper: its table, a claim with all its runs, and its figures."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from minilora.experiments.claims.claim import Claim, summary
from minilora.experiments.claims.ledger import CLAIMS, FAMILIES, Case, find, finding, reported, stored
from minilora.experiments.claims.study import paired_losses
from minilora.experiments.tune import TUNING_SEED
from minilora.storage.files import replacing

VERDICTS = ("holds", "fails", "depends", "open", "not run")
PAGE = "data/claims/README.md"  # what `page` says, as the README of the repository links to it
GUIDE = "minilora/experiments/claims/README.md"  # how to read it, with what `overview` says
# Of the page, what whoever asks "how does LoRA really work?" should read first; the README shows the short of these.
HEADLINES = (
    *("as-full", "targets-qv", "targets-mlp", "rank-8", "rate-any-rank", "again-gain", "capacity-two-bits"),
    *("capacity-enough", "qlora", "forget-less", "forget-rate", "facts-strangers", "few-good", "rl-rank-1"),
    *("dpo-accuracy", "teach-soft", "add-tuned", "overlap-subspaces", "wire-data-parallel", "wire-sharded"),
)


def page() -> str:
    """The ledger in Markdown: a table for each family, in it a row for each claim and each study and scale of it."""
    sections = []
    for family in FAMILIES:
        counted = "; ".join(f"{verdict} {number}" for verdict, number in count(family).items())
        head = f"## {subject_of(family)}\n\n{len(family.CLAIMS)} claims: {counted}."
        sections.append(f"{head}\n\n{rows_of(family.CLAIMS)}")
    guide = f"[the page on the ledger](../../{GUIDE})"
    about = f"What is said about LoRA, and what was measured. How to read this: {guide}."
    about += "\nWritten by `python -m minilora claims`, from the runs in this folder."
    return "\n\n".join([f"# The ledger\n\n{about}", *sections]) + "\n"


def overview() -> str:
    """A row for each family, with how many of its claims hold, and so on."""
    rows = [f"| subject | claims | {' | '.join(VERDICTS)} |", "|---" * 7 + "|"]
    for family in FAMILIES:
        subject, counted = subject_of(family), count(family)
        anchor = "".join(sign for sign in subject.lower() if sign.isalnum() or sign in " -").replace(" ", "-")
        numbers = " | ".join(str(counted.get(verdict, "")) for verdict in VERDICTS)
        rows.append(f"| [{subject}](../../../{PAGE}#{anchor}) | {len(family.CLAIMS)} | {numbers} |")
    return "\n".join(rows)


def headlines() -> str:
    """Of each of HEADLINES a row: the sentence, what was found, and the number of each study with its interval."""
    rows = ["| what is said | found | the number of each study (90 % interval) |", "|---|---|---|"]
    for claim in (CLAIMS[name] for name in HEADLINES):
        found = [(case, finding(claim, case)) for case in find(claim.name)]
        numbers = [f"{case.title}: {its.text().partition(';')[0]}" for case, its in found if its]
        rows.append(f"| {claim.sentence} (`{claim.name}`) | **{verdict_of(claim)}** | {'; '.join(numbers)} |")
    return "\n".join(rows)


def count(family: ModuleType) -> dict[str, int]:
    """By verdict, how many of a family's claims."""
    verdicts = Counter(verdict_of(claim) for claim in family.CLAIMS)
    return {verdict: verdicts[verdict] for verdict in VERDICTS if verdicts[verdict]}


def verdict_of(claim: Claim) -> str:
    return summary([found for case in find(claim.name) if (found := finding(claim, case))])


def subject_of(family: ModuleType) -> str:
    """What a module of claims says of itself, in its docstring's first line."""
    subject = (family.__doc__ or "").partition("\n")[0].removeprefix("Claims about ").rstrip(".")
    return subject[0].upper() + subject[1:]


def rows_of(claims: Iterable[Claim]) -> str:
    rows = ["| claim | verdict | study | the number that decides (90 % interval) | seeds, date |", "|---" * 5 + "|"]
    for claim in claims:
        said = f"`{claim.name}`: {claim.sentence} ({claim.source})"
        cases = [(case, finding(claim, case)) for case in find(claim.name)]
        verdict = f"**{verdict_of(claim)}**"
        if 0 < (done := sum(found is not None for _, found in cases)) < len(cases):
            verdict += f" ({done} of {len(cases)} studies)"
        for case, found in cases:
            number = f"{found.verdict}, {found.text()}" if found else "not run"
            runs = f"{found.seeds}, {last_date(case)}" if found else ""
            rows.append(f"| {said} | {verdict} | {case.title} | {number} | {runs} |")
            said = verdict = ""
    return "\n".join(rows)


def last_date(case: Case) -> str:
    return max(record["date"] for record in stored(case.study, case.scale) if record["arm"] in case.arms)


def details(name: str, scale: str | None = None) -> str:
    """A claim with its rule and the runs of its arms, or a study with all its runs and what follows from them."""
    cases, lines, wide = find(name, scale), [], 2 + max(map(len, CLAIMS))
    if name in CLAIMS:
        claim = CLAIMS[name]
        about = {"said by": claim.source, "statistic": claim.rule.statistic, "rule": claim.rule.words}
        about |= {"objection": claim.objection}
        lines = [claim.sentence, *(f"{key:<11}{value}" for key, value in about.items()), ""]
    for case in cases:
        lines += [*runs_of(case), ""]
        for claim in [CLAIMS[name]] if name in CLAIMS else CLAIMS.values():
            if case.study in claim.studies:
                found = finding(claim, case)
                verdict = f"{found.verdict}: {found.text()}, {found.seeds} seeds" if found else "not run yet"
                lines.append(verdict if name in CLAIMS else f"{claim.name:<{wide}}{verdict}")
        lines.append("")
    return "\n".join(lines[:-1])


def runs_of(case: Case) -> list[str]:
    """A line for every stored run of the case's arms."""
    study, plan = case.study, case.study.plans[case.scale]
    records = [record for record in stored(study, case.scale) if record["arm"] in case.arms]
    runs = f"{plan.steps} steps, {plan.seeds} seeds, about {plan.minutes:g} minutes a run on two cores"
    names = list(dict.fromkeys(name for record in records for name in record.get("scores", {})))
    wide = max(map(len, case.arms))
    columns = {name: max(10, len(name) + 2) for name in names}  # and their widths
    head = f"{'arm':<{wide}}{'rate':>9}{'seed':>6}{'loss':>12}" + "".join(f"{n:>{w}}" for n, w in columns.items())
    lines = [f"{case.title}: {study.about}; {runs}", f"{head}{'seconds':>9}"]
    for arm in case.arms:
        if (owner := study.arms[arm].rate_of) is not None:
            times = study.arms[arm].rate_times
            lines.insert(-1, f"{arm} takes {'' if times == 1 else f'{times:.2g} times '}the rate of {owner}")
    for record in records:
        loss, rate = record.get(study.chosen_by), record["learning_rate"]
        text = f"{record['arm']:<{wide}}{'' if rate is None else f'{rate:g}':>9}{record['seed']:>6}"
        lost = "diverged" if rate is not None else ""
        text += f"{lost if loss is None else f'{loss:.4f}':>12}"
        for name, width in columns.items():
            value = record.get("scores", {}).get(name)
            text += f"{'' if value is None else f'{value:.3f}':>{width}}"
        kind = "  (chooses the rate)" if record["seed"] == TUNING_SEED else ""
        lines.append(f"{text}{record.get('seconds', ''):>9}{kind}")
    return lines


def draw(name: str, scale: str | None, folder: Path) -> list[Path]:
    """Writes a figure of the reported runs of each case that has any, and returns the paths.

    A study's own figure shows all its arms; a claim's own, and the plain one of losses, those that the claim compares.
    """
    paths = []
    for case in find(name, scale):
        study, own = case.study, CLAIMS[name].figure if name in CLAIMS else None
        figure = own or study.figure
        arms = case.arms if own or figure is paired_losses else tuple(study.arms)
        runs = {arm: by_seed for arm, by_seed in reported(study, case.scale).items() if arm in arms and by_seed}
        if runs:
            paths.append(folder / f"{name}.{study.name}.{case.scale}.png")
            with replacing(paths[-1]) as temporary:
                figure(f"{name}: {case.title}", runs).write(temporary)
    return paths
