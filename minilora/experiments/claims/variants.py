"""Claims about LoRA beside full fine-tuning, and about its variants: that they learn as well, or better."""

from minilora.experiments.claims.claim import Claim, Rule, better, no_worse
from minilora.experiments.claims.study import Arm, Plan, Study

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


def on_dialect(name: str, sentence: str, source: str, rule: Rule, objection: str) -> Claim:
    return Claim(name, sentence, source, rule, (DIALECT,), f"one task, one length, one small base; {objection}")


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
