"""Claims about adapters after training: merged into their base, and added to each other."""

from collections.abc import Mapping
from typing import Any

from minilora.adapters.adapter import Adapter, apply_adapter, extract_adapter
from minilora.adapters.combine import concatenate
from minilora.adapters.inject import lora_layers, merge_lora
from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Record, Rule, quantity
from minilora.experiments.claims.study import Arm, Plan, Setting, Study, dataset, loss_of, losses
from minilora.inference.evaluate import score_task
from minilora.linear4bit import dequantize_model, quantize_model
from minilora.model import GPT

# Merging


def merged_losses(setting: Setting) -> dict[str, Any]:
    """Validation loss, float32, with the adapter apart, merged into floats, and these rounded to NF4 (again)."""
    data, tokenizer = setting.dataset(), setting.base.tokenizer
    trained = setting.train(data, evaluations=2)
    record, model = losses(trained), trained.model
    if setting.tuning:
        return record
    task = data.task
    assert task and isinstance(model, GPT)
    loss: dict[str, float] = {}
    score: dict[str, float] = {}

    def look(state: str):
        loss[state] = loss_of(model, data.validation)
        score[f"right, {state}"] = score_task(model, tokenizer, task, 100).score

    for _, layer in lora_layers(model):
        vars(layer)["forming_pays"] = lambda x: False  # or W + s·BA would be formed for the batch, which is to merge
    look("apart")
    merge_lora(dequantize_model(model))
    loss["merged"] = loss_of(model, data.validation)
    quantize_model(model)
    look("rounded")
    gain = record["validation_loss"][0][1] - loss["apart"]
    lost = {f"lost, {state} %": 100 * (loss[state] - loss["apart"]) / gain for state in ("merged", "rounded")}
    return record | {"scores": lost | score, "losses": loss}


MERGE = Study(
    "merge",
    "LoRA and QLoRA trained, then merged into floats, and the sum rounded to NF4; of the gain in loss, what is lost",
    {"lora": Arm("lora"), "qlora": Arm("qlora", rate_of="lora")},
    {
        "tiny": Plan("json", steps=60, seeds=3, minutes=0.4),
        "smollm2": Plan("orders", steps=30, seeds=3, minutes=2.5),
    },
    merged_losses,
    figure=bars(
        ["lost, merged %", "lost, rounded %"],
        "lost by merging, % of the gain in loss\n(the rules' bars: merged 1, rounded 5)",
    ),
)


# Sums

TASKS = ("json", "pirate")
WEIGHTS = {"1 + 1": (1, 1), "0.6 + 0.4": (0.6, 0.4), "0.5 + 0.5": (0.5, 0.5)}
ANSWERS = 100


def sum_of_two(setting: Setting) -> dict[str, Any]:
    """Two adapters trained apart at one rate, and what their sums score on both tasks."""
    data = {task: dataset(task, setting.base) for task in TASKS}

    def scores_of(adapter: Adapter | None) -> list[float]:
        model = setting.base.load().eval()
        if adapter is not None:
            apply_adapter(model, adapter)
        model.eval()
        tasks = [each.task for each in data.values()]
        return [score_task(model, setting.base.tokenizer, task, ANSWERS).score for task in tasks if task]

    if setting.arm.method is None:
        alone = zip(TASKS, scores_of(None), strict=True)
        return {"scores": {f"{task} alone": score for task, score in alone}}
    runs = {task: setting.train(each, evaluations=2) for task, each in data.items()}
    best = [run.history.best_validation_loss for run in runs.values()]
    record: dict[str, Any] = {"best_validation_loss": sum(best) / 2, "losses": best}
    if setting.tuning:
        return record
    adapters = [extract_adapter(run.model) for run in runs.values()]
    scores = {f"{task} alone": scores_of(adapters[place])[place] for place, task in enumerate(TASKS)}
    for name, weights in WEIGHTS.items():
        both = scores_of(concatenate(adapters, weights))
        scores |= {f"{task}, {name}": score for task, score in zip(TASKS, both, strict=True)}
    return record | {"scores": scores}


def left_of_the_worse(runs: Mapping[str, Record]) -> float:
    """Of each task's score alone, what the plain sum keeps; the lower of the two."""
    scores = runs["lora"]["scores"]
    return 100 * min(scores[f"{task}, 1 + 1"] / scores[f"{task} alone"] for task in TASKS)


SUMS = Study(
    "sums",
    "LoRA on json and LoRA on pirate, trained apart, rank 8 on all linears; their ΔW added exactly",
    {"lora": Arm("lora"), "base": Arm(None)},
    {"tiny": Plan("json and pirate", steps=60, seeds=3, minutes=0.9)},
    sum_of_two,
    figure=bars([f"{task}{what}" for what in (" alone", ", 1 + 1") for task in TASKS], "share of right answers"),
)


def lost(arm: str, state: str, words: str, bar: float) -> Rule:
    return quantity(
        arm, f"lost, {state} %", f"of the gain in validation loss, percent lost by {words}", bar, above=False
    )


CLAIMS = [
    Claim(
        "merge",
        "Merging an adapter changes nothing in what the model says.",
        "Hu et al. 2021, section 4.1",
        lost("lora", "merged", "merging, float32", 1),
        (MERGE,),
        "float32; in bfloat16 the sum keeps 8 binary digits, and notebook 05 finds logits off by nearly a hundredth",
    ),
    Claim(
        "merge-4bit",
        "A QLoRA adapter is merged into its base, which stays in 4 bits, at no loss.",
        "popular articles; tools that offer it",
        lost("qlora", "rounded", "merging and rounding to NF4 again", 5),
        (MERGE,),
        "the bar could hardly be reached: 5 % of the gain is 0.24 nats, and the trained models' loss 0.017 to 0.137; "
        "in percent of that loss, rounding costs 1.0, 5.9 and 7.4 %; the model of the 1.0 had hardly learned (3 right "
        "answers in 100)",
    ),
    Claim(
        "sum",
        "Adapters can be added up: the sum does both tasks.",
        "Ilharco et al. 2022, arXiv:2212.04089, section 4, for full fine-tuning; popular articles on merging adapters",
        Rule(
            ("lora", "base"),
            "of each task's score alone, percent left under the plain sum, the lower of the two tasks",
            left_of_the_worse,
            bar=80,
        ),
        (SUMS,),
        "two tasks with very different outputs; smaller weights may do better; to find them needs both scorers",
    ),
]
