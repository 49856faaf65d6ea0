"""Every option of the command line, once; `__main__.py` says which verb has which, and where a verb differs."""

import argparse
from pathlib import Path
from typing import Any

from minilora.experiments.methods import DEFAULT_METHODS, METHODS, Experiment
from minilora.experiments.run import BASE
from minilora.levels import LEVELS
from minilora.presets import PRESETS
from minilora.quant import QLORA
from minilora.storage.get import SOURCES
from minilora.text.datasets import HELD_OUT, PYTHON_CODE
from minilora.text.instruction_sets import SCORERS
from minilora.text.tasks import TASKS

CONVERSE = object()  # what --chat is without a question
DATA_HELP = (
    f"instead of a task: {', '.join(SCORERS)} (its pirate is not the task of that name), or your own FILE.jsonl of "
    "prompts and completions or of messages; "
    f"{PYTHON_CODE}, or any UTF-8 text file"
)
FLAG, SWITCH = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
OPTIONS: dict[str, dict[str, Any]] = {
    "--accumulation-steps": dict(type=int, default=1, help="micro-batches the batch is cut into"),
    "--adapter": dict(type=Path, help="an adapter folder in PEFT layout"),
    "--alpha": dict(type=float, help="lora_alpha (twice the rank)"),
    "--autocast": FLAG | dict(help="matrix products in bfloat16 whatever the weights are"),
    "--base": dict(type=Path, default=BASE, help="a model folder, a GGUF file, or a name that get knows"),
    "--batch-size": dict(type=int, help="sequences per step (16, of instruction data 8)"),
    "--block-size": dict(type=int, default=QLORA.block_size, help="weights with one scale"),
    "--chat": dict(nargs="?", const=CONVERSE, metavar="QUESTION", help="answer it; without one, converse"),
    "--count": dict(type=int, default=HELD_OUT, help="held-out examples at most, to validate and to score"),
    "--counted-tokens": dict(type=int, help="of each sequence, in the loss (all but the first)"),
    "--data": dict(help=DATA_HELP),
    "--device": dict(choices=("auto", "cpu", "cuda", "mps"), default="auto"),
    "--double-quant": SWITCH | dict(default=QLORA.double_quant, help="8-bit scales"),
    "--dropout": dict(type=float, default=0.0, help="lora_dropout"),
    "--dtype": dict(
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the base's weights (auto: bfloat16 where the base has it and nothing of it is trained, else float32)",
    ),
    "--force": FLAG | dict(help="load an adapter that was trained on another base"),
    "--gradient-checkpointing": FLAG | dict(help="keep less for backward, compute it again"),
    "--group-by-length": SWITCH | dict(help="batches of rows of like length: less padding"),
    "--learning-rate": dict(type=float, help="instead of the tuned one"),
    "--loraplus-ratio": dict(type=float, default=Experiment.loraplus_ratio, help="B's rate over A's"),
    "--max-new-tokens": dict(type=int, help="64, for an answer of a chat 512"),
    "--method": dict(choices=METHODS, default="lora"),
    "--methods": dict(default=",".join(DEFAULT_METHODS), help=f"of {', '.join(METHODS)}"),
    "--model": dict(choices=PRESETS, default="llama-2-7b"),
    "--out": dict(type=Path),
    "--overwrite": FLAG | dict(help="replace what --out holds, also a model by an adapter or an adapter by a model"),
    "--precision": dict(choices=("auto", "float32", "bfloat16"), default="auto"),
    "--quantize": dict(choices=("auto", "none", *LEVELS), default="auto", help="the base in 4 bits (auto: as trained)"),
    "--rank": dict(type=int, default=8),
    "--resume": FLAG | dict(help="continue the run whose state is under --out"),
    "--rounds": dict(type=int, help="of the actions in turn (5; of a real model 3)"),
    "--save-every": dict(type=int, default=50, help="steps between saved states"),
    "--scheme": dict(choices=LEVELS, default=QLORA.scheme, help="4 bits of the base, qlora and loftq"),
    "--seed": dict(type=int, default=0),
    "--seeds": dict(type=int, default=1, help="how many seeds, counted up from --seed"),
    "--sequence-length": dict(type=int, default=128, help="tokens per row of text, and of an example at most"),
    "--steps": dict(type=int, help="optimizer steps (150, of instruction data 30 or four passes)"),
    "--targets": dict(default="all-linear", help="q_proj,v_proj or a regular expression or all-linear"),
    "--task": dict(help=f"one of {', '.join(TASKS)}"),
    "--temperature": dict(type=float, default=0.0),
    "--top-k": dict(type=int),
    "--top-p": dict(type=float),
    "--tune": FLAG | dict(help="choose learning rates on the grid and store them"),
    "--virtual-tokens": dict(type=int, default=Experiment.virtual_tokens, help="of soft-prompt and prefix"),
    "file": dict(type=Path, help="a GGUF file"),
    "name": dict(choices=SOURCES),
    "prompt": dict(nargs="?", help='for example "Instruction: List three animals.\\nAnswer:"'),
}
