"""Claims about variants of LoRA: that they learn better at the same rank, for the same price."""

from minilora.experiments.claims.claim import Arm, Claim, Lower, Plan

DIALECT = {"tiny": Plan("dialect", 100, 5, 15)}
ONE_TASK = "one task, one rank and one length of training, on a small base"
CLAIMS = [
    Claim(
        "dora",
        "DoRA learns better than LoRA at the same rank.",
        "Liu et al. 2024, arXiv:2402.09353, section 5",
        {"lora": Arm("lora"), "dora": Arm("dora")},
        Lower("dora", "lora"),
        DIALECT,
        f"{ONE_TASK}; the paper's gains are largest at low rank, on models a thousand times as large",
    ),
    Claim(
        "lora-plus",
        "LoRA+, whose B learns 16 times as fast as A, learns better at no cost.",
        "Hayou et al. 2024, arXiv:2402.12354, section 5",
        {"lora": Arm("lora"), "lora+": Arm("lora+")},
        Lower("lora+", "lora"),
        DIALECT,
        f"{ONE_TASK}; the paper argues from the limit of great width, and this base is 192 wide",
    ),
    Claim(
        "rslora",
        "At a high rank the scale alpha/√r learns better than alpha/r, which holds high ranks back.",
        "Kalajdzievski 2023, arXiv:2312.03732, section 4",
        {
            "lora": Arm("lora", {"r": 64, "lora_alpha": 16}),
            "rslora": Arm("rslora", {"r": 64, "lora_alpha": 16}),
        },
        Lower("rslora", "lora"),
        {"tiny": Plan("dialect", 100, 5, 18)},
        "each arm has a rate of its own, and a rate can make up for a scale; the paper uses one rate for all ranks",
    ),
]
