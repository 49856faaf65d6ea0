"""The rules on preferences. Each arm has one rate; of the arms of a goal the best counts, seed by seed."""

from collections.abc import Mapping

from minilora.experiments.claims.claim import Record, Rule

Names = tuple[str, ...]
Runs = Mapping[str, Record]


def best(runs: Runs, names: Names) -> Record:
    """The run that says the chosen style most at its end; of equals the one that has forgotten least."""
    return max((runs[name] for name in names), key=lambda run: (run["scores"]["said"], -run["scores"]["forgot"]))


def looks(runs: Runs, names: Names) -> list[Mapping]:
    """All looks at these runs, but for those before the first step."""
    return [look for name in names for look in runs[name]["curve"][1:]]


def says(names: Names, bar: float = 90) -> Rule:
    words = "samples in the chosen style after the last step, at the best of four rates"
    return Rule(names, words, lambda runs: 100 * best(runs, names)["scores"]["said"], bar, signed=False)


def says_more(names: Names, than: Names, words: str, bar: float) -> Rule:
    def number(runs: Runs) -> float:
        return 100 * (best(runs, names)["scores"]["said"] - best(runs, than)["scores"]["said"])

    return Rule((*names, *than), f"samples in the chosen style, {words}, each at its best rate", number, bar, "points")


def accuracy_is_what_is_said(names: Names, bar: float = 10) -> Rule:
    def number(runs: Runs) -> float:
        gaps = [abs(look["accuracy"] - look["said"]) for look in looks(runs, names)]
        return 100 * sum(gaps) / len(gaps)

    words = "between the share of held-out pairs in which the chosen answer gains more than the rejected one and the "
    words += "share of samples in the chosen style: the mean distance, over four rates and six looks at each run"
    return Rule(names, words, number, bar, "points", above=False)


def lost_by_lowest_loss(names: Names, bar: float = 10) -> Rule:
    def number(runs: Runs) -> float:
        kept = min(looks(runs, names), key=lambda look: look["loss"])
        return 100 * (max(look["said"] for look in looks(runs, names)) - kept["said"])

    words = "samples in the chosen style at the best of all looks at all rates, above those at the look with the "
    return Rule(names, words + "lowest loss on held-out pairs", number, bar, "points", above=False)


def chosen_rises(names: Names, bar: float = 0) -> Rule:
    words = "by how much the log-probability of a held-out chosen answer, without its end token, rises until the last "
    words += "step, at the rate of four that says the chosen style most, of equals at the one that has forgotten least"
    return Rule(names, words, lambda runs: best(runs, names)["scores"]["chosen"], bar, "nats")


def forgets_less(names: Names, than: Names, bar: float = 20) -> Rule:
    def number(runs: Runs) -> float:
        mine, other = (best(runs, side)["scores"]["forgot"] for side in (names, than))
        return 100 * (other - mine) / max(other, mine, 0.05)

    words = "by how much less the loss on old text rises with DPO than with supervised training on the chosen answers, "
    words += "percent of the larger rise, or of 0.05 nats where it is smaller, each at its best rate"
    return Rule((*names, *than), words, number, bar)


def strays_less(arm: str, than: str, bar: float = 20) -> Rule:
    def number(runs: Runs) -> float:
        mine, other = (runs[name]["scores"]["KL"] for name in (arm, than))
        return 100 * (other - mine) / max(other, mine)

    words = "divergence (KL) of a sampled answer from the reference with beta 0.5 below that with 0.05, percent of the "
    return Rule((arm, than), words + "larger, at one rate (1e-3) and after as many steps", number, bar)
