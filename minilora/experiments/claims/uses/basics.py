"""Claims about what is trained, and on what: the rank of ΔW, a base in four bits, prompts in place of weights."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.adapters.prompts import Prompt
from minilora.experiments.bench_model import english_rows
from minilora.experiments.bench_ratios import ModelBenchSettings
from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Record, Rule
from minilora.experiments.claims.study import Arm, Plan, Setting, Study, loss_of, losses
from minilora.experiments.looks import BLACK, DARK, VERMILION, legend_below, new_figure
from minilora.experiments.pictures import Figure, redrawable
from minilora.inference.evaluate import score_task
from minilora.linear4bit import float_linears
from minilora.model import GPT
from minilora.quant import Quantization
from minilora.text.batches import Batches, pack
from minilora.text.world import World
from minilora.train import next_token_targets
from minilora.train_settings import IGNORE

# The rank of ΔW

RANKS = (0, 1, 2, 4, 8, 16, 32, 64)
LEAST_SHARE, MOST_NATS = 90, 0.05  # the rules' bars: of what is kept, and of the rise of the loss


def directions(change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ΔW (out, in) as n = min(out, in) pieces of rank 1, the largest first: the energy of each, σ² (n,), and L (out, n)
    and R (n, in), of which the first r columns and rows are the nearest matrix of rank r (Eckart and Young 1936).

    An SVD by eigenvalues of ΔW ΔWᵀ, in float64; a GPU finds these faster.
    """
    if len(change) > change.shape[1]:  # the shorter side has fewer of them
        energies, L, R = directions(change.T)
        return energies, R.T, L.T
    energies, U = torch.linalg.eigh(change.double() @ change.double().T)
    U = U.flip(1)
    return energies.flip(0).clamp(min=0), U.to(change.dtype), (U.T @ change.double()).to(change.dtype)


@torch.no_grad()
def cut_to_ranks(setting: Setting) -> dict[str, Any]:
    """Trains in full, and measures the loss with each linear layer's ΔW cut to its first directions.

    Embedding and norms stay as trained, so that the whole ΔW is the trained model. "kept at 8" is the share of what
    training gained in loss that is left at rank 8; "energy at 8" the share of ‖ΔW‖² in 8 directions, mean of layers.
    """
    data = setting.dataset()
    with torch.enable_grad():
        trained = setting.train(data, evaluations=1)
    record = losses(trained)
    if setting.tuning:
        return record
    plain, model = setting.base.load(), trained.model
    base, linears, pieces, energy = float_linears(plain), float_linears(model), {}, []
    before, after = (loss_of(each, data.validation) for each in (plain, model))
    for name, linear in linears.items():
        energies, *pieces[name] = directions(linear.weight - base[name].weight)
        energy.append(energies.cumsum(0) / energies.sum())

    def loss_at(rank: int) -> float:
        for name, (L, R) in pieces.items():
            linears[name].weight.copy_(base[name].weight + L[:, :rank] @ R[:rank])
        return loss_of(model, data.validation)

    by_rank = {rank: loss_at(rank) for rank in RANKS}
    scores = {f"kept at {rank}": (before - loss) / (before - after) for rank, loss in by_rank.items()}
    scores["energy at 8"] = sum(each[7].item() for each in energy) / len(energy)
    scores["rank for 90 %"] = sum(int((each < 0.9).sum()) + 1 for each in energy) / len(energy)
    shares = [sum(each[rank - 1].item() for each in energy) / len(energy) for rank in RANKS[1:]]
    return record | {"scores": scores, "loss_by_rank": list(by_rank.items()), "energy_by_rank": [0.0, *shares]}


@redrawable
def kept_by_rank(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """What is left of the task and of ‖ΔW‖² over the rank that ΔW is cut to, a line for each seed.

    On the right what the cut costs: the rise of the loss above the trained model's, in nats, at the seeds' mean gain.
    """
    figure, (axes,) = new_figure()
    for seed, run in runs["full"].items():
        kept = [run["scores"][f"kept at {rank}"] for rank in RANKS]
        looks = {"gain in loss": (kept, "-o", VERMILION), "‖ΔW‖²": (run["energy_by_rank"], "--s", BLACK)}
        for label, (shares, style, colour) in looks.items():
            values = [100 * share for share in shares]
            axes.plot(range(len(RANKS)), values, style, color=colour, markersize=4, label="" if seed else label)
    histories = [[loss for _, loss in run["validation_loss"]] for run in runs["full"].values()]
    gain = statistics.mean(before - after for before, *_, after in histories)  # nats

    def share_of(nats: Any) -> Any:
        return 100 * (1 - nats / gain)

    thin: dict[str, Any] = {"color": DARK, "linewidth": 1}
    axes.axhline(LEAST_SHARE, linestyle=":", label=f"low-rank's bar, {LEAST_SHARE} %", **thin)
    axes.axhline(share_of(MOST_NATS), linestyle="--", label=f"extract's bar, {MOST_NATS} nats", **thin)
    nats = axes.secondary_yaxis("right", functions=(lambda share: gain * (1 - share / 100), share_of))
    nats.set_ylabel("rise of the loss (nats)")
    axes.set_xticks(range(len(RANKS)), RANKS)
    axes.set_ylim(min(-5, axes.get_ylim()[0]) if axes.get_ylim()[0] > -60 else -60, 105)
    axes.set_title(title.partition(",")[0], fontsize="medium")
    axes.set(xlabel="rank that each ΔW is cut to", ylabel="share that is kept (%)")
    legend_below(figure, axes)
    return figure


def rank_study(task: str, plans: dict[str, Plan]) -> Study:
    about = f"full fine-tuning on {task}, then each linear layer's ΔW is cut to a rank, with nothing trained again"
    return Study(f"rank-{task}", about, {"full": Arm("full")}, plans, cut_to_ranks, figure=kept_by_rank)


RANK = (
    rank_study("json", {"tiny": Plan("json", steps=100, seeds=3, minutes=0.4)}),
    rank_study("dialect", {"tiny": Plan("dialect", steps=100, seeds=3, minutes=0.4)}),
    rank_study("orders", {"smollm2": Plan("orders", steps=30, seeds=3, minutes=2.5)}),
)


def of_rank_8(name: str, words: str) -> Rule:
    return Rule(("full",), words, lambda runs: 100 * runs["full"]["scores"][name], bar=LEAST_SHARE)


def rise_at_8(runs: Mapping[str, Record]) -> float:
    _, after = runs["full"]["validation_loss"][-1]
    return dict(runs["full"]["loss_by_rank"])[8] - after


# Four bits

SCHEMES = {"floats": None, "nf4": "nf4", "int4": "int4", "fp4": "fp4"}


def text_rows(setting: Setting) -> Batches:
    """Text that the base is good at, another for each seed: of the tiny base's world, or English documentation."""
    tokenizer = setting.base.tokenizer
    if setting.plan.data == "english":
        return english_rows(tokenizer, ModelBenchSettings(seed=setting.seed, text_rows=32, text_length=256))
    documents = World().documents(400, seed=f"4 bits {setting.seed}")
    return pack([tokenizer.encode(document.text) for document in documents], 256, tokenizer)


@torch.no_grad()
def cost_of_rounding(setting: Setting) -> dict[str, Any]:
    """What an untrained base loses in 4 bits: the rise of its loss, and KL(as it came ‖ rounded), nats per token."""
    scheme, rows = setting["scheme"], text_rows(setting)
    base, rounded = setting.base.load().eval(), setting.base.load(Quantization(scheme) if scheme else None).eval()
    nats, rise, tokens = 0.0, 0.0, 0
    for ids, labels in zip(rows.input_ids.split(4), rows.labels.split(4), strict=True):
        targets = next_token_targets(labels).to(setting.base.device)
        counts = targets != IGNORE
        was, now = (model(ids.to(setting.base.device))[counts].log_softmax(-1) for model in (base, rounded))  # (N, V)
        nats += F.kl_div(now, was, log_target=True, reduction="sum").item()
        picked = targets[counts][:, None]
        rise += (was.gather(1, picked) - now.gather(1, picked)).sum().item()
        tokens += len(was)
    return {"scores": {"KL": nats / tokens, "rise": rise / tokens}, "tokens": tokens}


def over_the_next_best(runs: Mapping[str, Record]) -> float:
    cost = {scheme: runs[scheme]["scores"]["KL"] for scheme in SCHEMES}
    return 100 * cost["nf4"] / min(cost["int4"], cost["fp4"])


ROUNDING = Study(
    "four-bits",
    "an untrained base, its block linears in 4 bits with double quantization; divergence from the floats on text",
    {name: Arm(None, settings={"scheme": scheme}) for name, scheme in SCHEMES.items()},
    {
        "tiny": Plan("world", steps=0, seeds=3, minutes=0.1),
        "smollm2": Plan("english", steps=0, seeds=3, minutes=0.5),
    },
    cost_of_rounding,
    chosen_by="",
    figure=bars(["KL", "rise"], "nats per token above the floats"),
)

# Prompts in place of weights


def skill(setting: Setting) -> dict[str, Any]:
    """Loss and share of right answers, also of the base as it is."""
    data, tokenizer = setting.dataset(), setting.base.tokenizer
    if setting.arm.method is None:
        model: GPT | Prompt = setting.base.load()
        record: dict[str, Any] = {"best_validation_loss": loss_of(model, data.validation)}
    else:
        trained = setting.train(data, evaluations=4)
        model, record = trained.model, losses(trained)
    if not setting.tuning:
        assert data.task
        record["scores"] = {"task": score_task(model, tokenizer, data.task).score}
    return record


PIRATE = Study(
    "soft-prompts",
    "pirate, a voice that the base can nearly speak; 16 virtual tokens, or rank 8 on all linears",
    {"lora": Arm("lora"), "soft-prompt": Arm("soft-prompt"), "prefix": Arm("prefix"), "base": Arm(None)},
    {"tiny": Plan("pirate", steps=100, seeds=3, minutes=0.2)},
    skill,
    figure=bars(["task"], "share of right answers"),
)


CLAIMS = [
    Claim(
        "low-rank",
        "What full fine-tuning changes is of low rank: 8 directions of each matrix do the task.",
        "Aghajanyan et al. 2020, arXiv:2012.13255, abstract; Hu et al. 2021, section 7.2",
        of_rank_8("kept at 8", "of what training gained in loss, percent left with each ΔW cut to rank 8"),
        RANK,
        "embedding and norms are not cut, and alone keep 66 % of the gain on dialect, 62 % on json, 38 % on orders; "
        "of the rest, which the linears bring, 8 directions keep 88.0 % on dialect (87.1 to 89.0, below the bar), "
        "99.6 % on json and 98.4 % on orders",
    ),
    Claim(
        "low-rank-numbers",
        "ΔW itself is nearly a matrix of low rank: 8 directions hold nearly all of it.",
        'Hu et al. 2021, section 4.1 ("low intrinsic rank"), as it is often retold',
        of_rank_8("energy at 8", "of ‖ΔW‖², percent in the first 8 directions, mean over layers"),
        RANK,
        "one rate and few steps; with weight decay, or a smaller rate and more steps, ΔW may have another spectrum",
    ),
    Claim(
        "extract",
        "A LoRA of rank 8 can be cut out of a fully fine-tuned model, at no loss worth naming.",
        "popular tools that extract an adapter from the difference of two models",
        Rule(
            ("full",),
            "rise of the validation loss, nats per token, with each ΔW cut to rank 8",
            rise_at_8,
            bar=MOST_NATS,
            unit="nats",
            above=False,
        ),
        RANK,
        "embedding and norms are not cut, and alone keep 66 % of the gain on dialect, 62 % on json, 38 % on orders; "
        "nothing is trained after the cut, which might win back what dialect loses",
    ),
    Claim(
        "nf4",
        "NF4 loses less than int4 and FP4, which take as many bits.",
        "Dettmers et al. 2023, arXiv:2305.14314, section 4 and table 2",
        Rule(
            tuple(SCHEMES),
            "divergence (KL) from the floats with NF4, percent of the lower of int4's and FP4's",
            over_the_next_best,
            bar=90,
            above=False,
        ),
        (ROUNDING,),
        "the seeds are texts, so the interval is not one over models; SmolLM2 came in 4 bits, on other levels",
    ),
    Claim(
        "soft-prompt",
        "A trained prompt does what LoRA does, with a hundredth of the parameters.",
        "Lester et al. 2021, arXiv:2104.08691, abstract: at the size of billions",
        Rule(
            ("soft-prompt", "lora", "prefix", "base"),
            "right answers of the soft prompt above those of LoRA, paired by seed",
            lambda runs: 100 * (runs["soft-prompt"]["scores"]["task"] - runs["lora"]["scores"]["task"]),
            bar=-10,
            unit="points",
        ),
        (PIRATE,),
        "the paper finds it for models of ten billion parameters and behind for small ones; 16 virtual tokens only",
    ),
]
