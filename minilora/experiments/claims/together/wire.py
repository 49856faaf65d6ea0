"""Claims about several devices: the bytes that training sends between them."""

import math
from typing import Any

from minilora.experiments import wire
from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Rule
from minilora.experiments.claims.study import Arm, Plan, Setting, Study
from minilora.experiments.devices import on_devices
from minilora.experiments.simulate import simulate
from minilora.model import GPTConfig

WAYS = {"data parallel": False, "sharded": True}
METHODS = ("full", "lora", "qlora")


def sent(setting: Setting) -> dict[str, Any]:
    """MB that one of so many processes sends in a step, counted, and by formula."""
    found = wire.measure(str(setting.base.directory), setting["method"], setting["devices"], setting["sharded"])
    return found | {"scores": {"MB sent": found["sent"] / 1e6, "MB by formula": found["formula"] / 1e6}}


WIRE = Study(
    "wire",
    "one training step, float32, LoRA and QLoRA of rank 8 on all linears; the bytes that collectives send, counted",
    {
        f"{method}, {way}": Arm(None, settings={"method": method, "sharded": sharded})
        for way, sharded in WAYS.items()
        for method in METHODS
    },
    {
        "tiny": Plan("json", steps=1, seeds=1, minutes=0.3, settings={"devices": 2}),
        "smollm2": Plan("orders", steps=1, seeds=1, minutes=1, settings={"devices": 2}),
    },
    sent,
    figure=bars(["MB sent"], "MB that each of two processes sends in a step"),
)


def share_of_full(method: str, way: str, bar: float, above: bool = False) -> Rule:
    arm, full = f"{method}, {way}", f"full, {way}"
    words = f"what {arm} sends in a step, as a share of what full fine-tuning sends"
    return Rule(
        (arm, full), words, lambda runs: 100 * runs[arm]["sent"] / runs[full]["sent"], bar, "%", above, exact=True
    )


GB = 10**9
DEVICE = 80 * GB


def devices_for(setting: Setting) -> dict[str, Any]:
    """How many devices of 80 GB a step needs: the fewest of 1, 2, 4 ... whose share fits, with a row on each."""
    config, method = GPTConfig.preset(setting["model"]), setting.arm.settings["method"]
    more: dict[str, Any] = dict(sequence_length=512, r=64, target_modules="all-linear", gradient_checkpointing=True)
    report = simulate(setting["model"], method, 1, **more)
    shares = {
        n: report.peak if n == 1 else on_devices(report, config, n, sharded=True).most for n in (2**k for k in range(8))
    }
    fewest = min((n for n, size in shares.items() if size <= DEVICE), default=math.inf)
    return {
        "scores": {"devices": fewest, "GB on one": report.peak / GB},
        "shares": {str(n): size for n, size in shares.items()},
    }


CLUSTER = Study(
    "cluster",
    "one step of Llama-2-70B, 512 tokens a device, rank 64 on all linears, activation checkpointing, bfloat16; on one "
    "device simulated, sharded by formula; how many devices of 80 GB it needs",
    {method: Arm(None, settings={"method": method}) for method in METHODS},
    {"large": Plan("json", steps=1, seeds=1, minutes=1.5, settings={"model": "llama-2-70b"})},
    devices_for,
    figure=bars(["devices"], "devices of 80 GB that a step of Llama-2-70B needs"),
)

LOCAL = "two processes of one machine, a ring of two: how long the bytes take depends on the network, which is not here"
CLAIMS = [
    Claim(
        "wire-data-parallel",
        "Data parallel, LoRA sends a tenth of what full fine-tuning sends at most: only what is trained has gradients.",
        "Hu et al. 2021, arXiv:2106.09685, section 4.2, on what need not be kept for frozen parameters",
        share_of_full("lora", "data parallel", 10),
        (WIRE,),
        objection=LOCAL,
    ),
    Claim(
        "wire-sharded",
        "Sharded over devices, LoRA saves as much on the wire.",
        "as popular articles carry the claim over",
        share_of_full("lora", "sharded", 10),
        (WIRE,),
        objection=f"a device that can hold the base between forward and backward need not gather it twice; {LOCAL}",
    ),
    Claim(
        "wire-sharded-4-bits",
        "Sharded, QLoRA sends a quarter of what full fine-tuning sends, or less: codes travel, and not weights.",
        "Answer.AI 2024, You can now train a 70b language model at home",
        share_of_full("qlora", "sharded", 25),
        (WIRE,),
        objection="of full fine-tuning in float32; in bfloat16 its weights are half as large and the codes are not. "
        + LOCAL,
    ),
    Claim(
        "cluster",
        "A fine-tune of 70 B parameters that needs a cluster in full fits on one device of 80 GB with QLoRA.",
        "Dettmers et al. 2023, arXiv:2305.14314, abstract, of 65 B and 48 GB",
        Rule(
            METHODS[:1] + METHODS[2:],
            "how many times as many devices of 80 GB full fine-tuning needs; nothing where QLoRA needs more than one",
            lambda runs: runs["full"]["scores"]["devices"] if runs["qlora"]["scores"]["devices"] == 1 else 0.0,
            4,
            "devices",
            exact=True,
            signed=False,
        ),
        (CLUSTER,),
        objection="the share of one of several devices is a formula, all kinds at their largest at once; activations "
        "of 512 tokens are small, and a batch that fills a cluster is not what runs on one device",
    ),
]
