"""Claims about preferences: what DPO teaches, what its own numbers say of it, and what it costs."""

from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Rule, quantity
from minilora.experiments.claims.goals.preferences_costs import bytes_of_a_step, time_of_a_step
from minilora.experiments.claims.goals.preferences_figures import what_is_said
from minilora.experiments.claims.goals.preferences_rules import (
    accuracy_is_what_is_said,
    chosen_rises,
    forgets_less,
    lost_by_lowest_loss,
    says,
    says_more,
    strays_less,
)
from minilora.experiments.claims.goals.preferences_runs import measure, measure_after
from minilora.experiments.claims.study import Arm, Plan, Study

# A rate for each arm, and of each goal the arm that says the chosen style most, seed by seed.
RATES = {"dpo": (1e-4, 3e-4, 1e-3, 3e-3), "sft": (1e-3, 3e-3, 1e-2), "dpo + sft": (3e-4, 1e-3, 3e-3)}
BETAS = {"weak": 0.05, "strong": 0.5}
SETTINGS = {"goal": None, "rate": None, "beta": 0.1, "ends": True, "looks": (5, 10, 20, 30, 40, 50)}


def arm(goal: str, rate: float, **more) -> Arm:
    return Arm(None, settings={"goal": goal, "rate": rate, **more})


ARMS = {f"{goal} {rate:g}": arm(goal, rate) for goal, rates in RATES.items() for rate in rates}
ARMS |= {f"{name} beta": arm("dpo", 1e-3, beta=beta) for name, beta in BETAS.items()}
ARMS["base"] = Arm(None)
OF = {goal: tuple(f"{goal} {rate:g}" for rate in rates) for goal, rates in RATES.items()}


def study(name: str, about: str, minutes: float, arms: dict[str, Arm], **more) -> Study:
    plan = Plan(name, steps=50, seeds=3, minutes=minutes, settings=SETTINGS | more)
    return Study(f"dpo-{name}", about, arms, {"tiny": plan}, measure, chosen_by="", figure=what_is_said)


VOICE = study("voice", "pairs of a pirate's words over the same statement, plain; the base never speaks so", 0.4, ARMS)
WORDING = study(
    "wording",
    "pairs of two wordings of a fact, both of which the base uses equally often",
    0.15,
    ARMS | {"end tokens": arm("dpo", 3e-4, ends=True)},  # put here after first runs, in which all pairs had them
    ends=False,
)

AFTER_RATES = {"dpo": (3e-4, 1e-3), "sft": (1e-3, 3e-3)}
AFTER_OF = {
    (pairs, goal): tuple(f"{pairs} {goal} {rate:g}" for rate in rates)
    for pairs in ("own", "given")
    for goal, rates in AFTER_RATES.items()
}
AFTER_ARMS = {
    name: arm(goal, rate, pairs=pairs)
    for (pairs, goal), names in AFTER_OF.items()
    for name, rate in zip(names, AFTER_RATES[goal], strict=True)
}
LATER = {  # what the first results asked for, in no rule: the next rate where the best of two lay at an end
    f"{pairs} {goal} {rate:g}": arm(goal, rate, pairs=pairs)
    for pairs in ("own", "given")
    for goal, rate in (("dpo", 1e-4), ("sft", 1e-2))
}
AFTER = Study(
    "dpo-after",
    "after 45 supervised steps as a pirate, half of the samples right: pairs of own samples, or given ones",
    dict(sorted((AFTER_ARMS | LATER).items())),
    {"tiny": Plan("voice", steps=40, seeds=3, minutes=0.5, settings=SETTINGS | {"looks": (10, 20, 30, 40)})},
    measure_after,
    chosen_by="",
    figure=bars(["said"], "share of samples that are right"),
)

STEP = {"adapter off": ("lora", False), "second model": ("lora", True), "full, beforehand": ("full", False)}


def step_plan(shape: str, dtype: str, pairs: int, length: int) -> Plan:
    return Plan(shape, 0, 1, 0.2, {"step": {"dtype": dtype, "pairs": pairs, "length": length}})


BYTES = Study(
    "dpo-bytes",
    "one step, all linears, rank 8: the base 16 pairs of 45 tokens, SmolLM2 4 of 96 (float32), Llama-2-7B 1 of 1,024",
    {name: Arm(None, settings={"method": method, "second": second}) for name, (method, second) in STEP.items()},
    {
        "tiny": step_plan("base", "float32", 16, 45),
        "smollm2": step_plan("smollm2", "float32", 4, 96),
        "large": step_plan("llama-2-7b", "bfloat16", 1, 1024),
    },
    bytes_of_a_step,
    chosen_by="",
    figure=bars(["above, % of weights"], "peak above SFT's on the same rows (% of the weights)", 5),
)
TIME = Study(
    "dpo-time",
    "steps of 16 pairs, 32 rows of 46 tokens, on the shipped base, float32 on one or two CPU cores, in turn",
    {"steps": Arm(None)},
    {"tiny": Plan("voice", steps=0, seeds=5, minutes=0.2, settings={"rounds": 9, "pairs": 16})},
    time_of_a_step,
    chosen_by="",
    figure=bars(["beforehand", "adapter off"], "time of a step over SFT's on the same rows (%)", 110),
)

RAFAILOV, OFTEN = "Rafailov et al. 2023, arXiv:2305.18290", "often said"
BEST = "of each goal the best of its rates is taken seed by seed, by the very samples that count"
SMALL = "50 steps and 400 pairs on a base of 3 million parameters; the pairs are exact, no one is of two minds on them"
CLAIMS = [
    Claim(
        "dpo-style",
        "DPO teaches a model to answer in the preferred style.",
        f"{RAFAILOV}, as it is often retold",
        says(OF["dpo"]),
        (VOICE, WORDING),
        "samples at temperature 1 count: on wording the likeliest answer is in the style always. And no one starts DPO "
        "from a base that, as on voice, never speaks so and says the plain statement as rarely: the paper trains on "
        "the chosen answers first. " + SMALL,
    ),
    Claim(
        "dpo-accuracy",
        "Preference accuracy tells what the model will say.",
        "the number that trainers report (rewards/accuracies) and that runs are judged by",
        accuracy_is_what_is_said(OF["dpo"]),
        (VOICE, WORDING),
        "the highest of the rates is one that a sensible person would not use; the lowest has hardly begun",
    ),
    Claim(
        "dpo-stop",
        "The checkpoint with the lowest validation loss is the one to keep.",
        f"{OFTEN}; the default of trainers that load the best model at the end",
        lost_by_lowest_loss(OF["dpo"]),
        (WORDING,),
        "the rate is chosen by that loss too, and not the step alone: within a run it costs 0 and 2 points at the two "
        "lower rates, 73 and 55 at the two higher",
    ),
    Claim(
        "dpo-likelihood",
        "DPO makes the chosen answers more likely.",
        f"{RAFAILOV}, section 4; against it Pal et al. 2024, arXiv:2402.13228, and Razin et al. 2024, arXiv:2410.08847",
        chosen_rises(OF["dpo"]),
        (VOICE, WORDING),
        "the rate at which the style is said most is one at which it became likelier: on wording chosen answers fall "
        "by 10 to 15 nats at the two higher rates. On voice they rise by 71 at the highest, to -62, and none is said",
    ),
    Claim(
        "dpo-sft-term",
        "With a term of cross entropy on the chosen answers, DPO teaches what it does not teach alone.",
        "Pang et al. 2024, arXiv:2404.19733, section 3",
        says_more(OF["dpo + sft"], OF["dpo"], "with the term above those of DPO alone", 10),
        (VOICE, WORDING),
        "supervised training on the chosen answers alone stands beside it (dpo-over-sft)",
    ),
    Claim(
        "dpo-over-sft",
        "Who has pairs gains more from DPO than from supervised training on the chosen answers.",
        OFTEN,
        says_more(OF["dpo"], OF["sft"], "with DPO above those of supervised training on the chosen answers", 5),
        (VOICE, WORDING),
        BEST + "; where supervised training says it always, nothing is left to gain",
    ),
    Claim(
        "dpo-forgets",
        "DPO forgets less than supervised training, since it is held to a reference.",
        OFTEN,
        forgets_less(OF["dpo"], OF["sft"]),
        (WORDING,),
        "after as many steps, and not where both have learned as much; both forget less than 0.05 nats; " + BEST,
    ),
    Claim(
        "dpo-beta",
        "A larger beta keeps the model closer to its reference.",
        f"{RAFAILOV}, section 3: beta controls the deviation from the reference",
        strays_less("strong beta", "weak beta"),
        (VOICE, WORDING),
        "50 steps: beta decides where training ends, and Adam, which divides by the gradient's size, decides how fast. "
        "At this rate a beta of 0.1 ends in gibberish on wording, 67 nats from the reference",
        bars(["KL"], "divergence from the reference (nats an answer)"),
    ),
    Claim(
        "dpo-own-pairs",
        "Pairs of the model's own samples teach more than pairs written by others.",
        "Tajwar et al. 2024, arXiv:2404.14367, abstract",
        says_more(AFTER_OF["own", "dpo"], AFTER_OF["given", "dpo"], "with own pairs above those with given ones", 5),
        (AFTER,),
        "own samples are right in every word or wrong; given pairs differ in style alone, which the start knows. They "
        "gain nothing at any of three rates (40 % at the start, 41 % at best), and supervised training on their chosen "
        "answers gains most of all, 76 %",
    ),
    Claim(
        "dpo-wrong-answers",
        "Wrong answers teach as well: DPO on own samples gains more than supervised training on those that are right.",
        "Tajwar et al. 2024, arXiv:2404.14367, section 5; Setlur et al. 2024, arXiv:2406.14532",
        says_more(AFTER_OF["own", "dpo"], AFTER_OF["own", "sft"], "with DPO above those with the right ones alone", 5),
        (AFTER,),
        "one task, one beta, and one round of samples; of the rates beyond both ends DPO says less at 1e-4, 49 %, and "
        "supervised training as much at 1e-2, 71 %, so the rates do not decide; " + BEST,
    ),
    Claim(
        "dpo-memory",
        "With an adapter, DPO's reference model costs no memory.",
        "TRL's documentation (ref_model=None with PEFT); popular articles",
        Rule(
            tuple(STEP),
            "peak of a DPO step above that of cross entropy on the same rows, percent of the model's weights",
            lambda runs: runs["adapter off"]["scores"]["above, % of weights"],
            bar=5,
            above=False,
            exact=True,
        ),
        (BYTES,),
        "full fine-tuning does as well without a second model, if the reference's answers are computed beforehand",
    ),
    Claim(
        "dpo-time",
        "With the reference computed beforehand, a step of DPO takes no longer than a supervised one.",
        "TRL's documentation (precompute_ref_log_probs)",
        quantity(
            "steps", "beforehand", "time of a step, percent of that of cross entropy on the same rows", 110, above=False
        ),  # fmt: skip
        (TIME,),
        "it is computed once for every pair, which takes a third of a step each: a gain only from the second epoch on",
    ),
]
