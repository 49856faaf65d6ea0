"""Claims about LoRA beside full fine-tuning, and about its variants: that they learn as well, or better."""

from functools import partial

from minilora.experiments.claims.claim import Claim, Rule, better, no_worse
from minilora.experiments.claims.study import Arm, Plan, Study, train_and_score

HIGH = {"r": 64, "lora_alpha": 16}
ARMS = {
    "full": Arm("full"),
    **{name: Arm(name) for name in ("lora", "qlora", "dora", "lora+", "pissa", "eva", "lora-fa", "prefix")},
    "lora r=64": Arm("lora", HIGH),
    "rslora r=64": Arm("rslora", HIGH),
}
DIALECT = Study(
    "dialect",
    "a hundred new words and a new word order, rank 8 on all linears unless said otherwise",
    ARMS,
    {"tiny": Plan("dialect", steps=100, seeds=5, minutes=0.3)},
)
# Nothing but a format is new here. 30 steps, because after 60 LoRA is near 0.013, where the frozen output head stops it
# on a token that the base never learned: from there on the arms could not be told apart. After 30 hardly an answer is
# right yet, so what is compared is how fast the loss falls.
JSON = Study(
    "json",
    "notes about a person as one JSON object, 30 steps, otherwise as dialect",
    ARMS,
    {"tiny": Plan("json", steps=30, seeds=3, minutes=0.3)},
    partial(train_and_score, evaluations=3),
)
ORDERS = Study(
    "orders",
    "an order in a sentence as one JSON object, 30 steps of 8; SmolLM2-135M, rank 8 on all linears",
    {name: ARMS[name] for name in ("full", "lora", "qlora", "dora")},
    {"smollm2": Plan("orders", steps=30, seeds=3, minutes=2)},
    partial(train_and_score, evaluations=2),
)


def on_dialect(name: str, sentence: str, source: str, rule: Rule, objection: str) -> Claim:
    """On dialect and json; and on orders, which has fewer arms, where it has the rule's."""
    studies = [DIALECT, JSON] + [ORDERS] * (set(rule.arms) <= set(ORDERS.arms))
    return Claim(name, sentence, source, rule, tuple(studies), f"small bases and short runs; {objection}")


CLAIMS = [
    on_dialect(
        "as-full",
        "LoRA learns as well as full fine-tuning.",
        "Hu et al. 2021, arXiv:2106.09685, abstract",
        no_worse("lora", "full"),
        "the task asks for a vocabulary of its own, which is more than a skill; rank 8 only",
    ),
    on_dialect(
        "qlora",
        "QLoRA, on a base in 4 bits, learns as well as LoRA.",
        "Dettmers et al. 2023, arXiv:2305.14314, abstract",
        no_worse("qlora", "lora"),
        "a base so small may lose more, or less, to 4 bits than a large one",
    ),
    on_dialect(
        "dora",
        "DoRA learns better than LoRA at the same rank.",
        "Liu et al. 2024, arXiv:2402.09353, abstract",
        better("dora", "lora"),
        "the paper's models are a thousand times as large",
    ),
    on_dialect(
        "lora-plus",
        "LoRA+, whose B learns 16 times as fast as A, learns better at no cost.",
        "Hayou et al. 2024, arXiv:2402.12354, abstract",
        better("lora+", "lora"),
        "the paper argues from the limit of great width, and this base is 192 wide",
    ),
    on_dialect(
        "rslora",
        "At a high rank the scale alpha/√r learns better than alpha/r, which holds high ranks back.",
        "Kalajdzievski 2023, arXiv:2312.03732, abstract",
        better("rslora r=64", "lora r=64"),
        "each arm has a rate of its own, which can make up for a scale; the paper uses one rate for all ranks",
    ),
    on_dialect(
        "pissa",
        "PiSSA, which starts from the largest singular values of W, learns better than LoRA.",
        "Meng et al. 2024, arXiv:2404.02948, abstract",
        better("pissa", "lora"),
        "the paper trains W without its largest part; here W stays and the start is subtracted, the same function",
    ),
    on_dialect(
        "eva",
        "EVA, which starts from the main directions of the activations, learns better than LoRA.",
        "Paischer et al. 2024, arXiv:2410.07170, abstract",
        better("eva", "lora"),
        "without the paper's redistribution of ranks",
    ),
    on_dialect(
        "lora-fa",
        "LoRA-FA, which leaves A as it started, learns as well as LoRA with half the trained numbers.",
        "Zhang et al. 2023, arXiv:2308.03303, abstract",
        no_worse("lora-fa", "lora"),
        "at a lower rank a random A would matter more",
    ),
    on_dialect(
        "prefix",
        "Prefix tuning learns as well as full fine-tuning with a thousandth of the parameters.",
        "Li and Liang 2021, arXiv:2101.00190, abstract",
        no_worse("prefix", "full"),
        "the paper's models know the language of the task; 16 virtual tokens only",
    ),
]
