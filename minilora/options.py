"""Every option of the command line, once; `__main__.py` says which verb has which, and where a verb differs."""

import argparse
from pathlib import Path
from typing import Any

import torch

from minilora import ranges
from minilora.command import a_name, a_path, a_text, number
from minilora.experiments.claims.study import BASES
from minilora.experiments.devices import DEVICES
from minilora.experiments.goals import TASK
from minilora.experiments.methods import DEFAULT_METHODS, GROUP, METHODS, OBJECTIVES, Experiment
from minilora.experiments.run import BASE
from minilora.experiments.simulate import SIMULATED_DTYPES, SIMULATED_METHODS, SIMULATED_OBJECTIVES
from minilora.levels import LEVELS
from minilora.presets import PRESETS
from minilora.quant import BLOCK_SIZES, QLORA
from minilora.storage.get import SOURCES
from minilora.text.datasets import HELD_OUT, PYTHON_CODE
from minilora.text.instruction_sets import SCORERS
from minilora.text.preferences import PAIRS
from minilora.text.tasks import TASKS

CONVERSE = object()  # what --chat is without a question
DATA_HELP = (
    f"instead of a task: {', '.join(SCORERS)} (its pirate is not the task of that name), or your own FILE.jsonl of "
    "prompts and completions or of messages; "
    f"{PYTHON_CODE}, or any UTF-8 text file"
)
FLAG, SWITCH = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}


def method_list(word: str) -> list[str]:
    methods = word.split(",")
    for method in methods:
        if method not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        if methods.count(method) > 1:
            raise argparse.ArgumentTypeError(f"{method} is there twice, and each method is compared once")
    return methods


OPTIONS: dict[str, dict[str, Any]] = {
    "--accumulation-steps": number(ranges.BATCH_SIZE, "micro-batches the batch is cut into", default=1),
    "--adapter": dict(type=a_path, help="an adapter folder in PEFT layout"),
    "--adapters": dict(type=a_path, metavar="FOLDER", help="holds the adapters, each in a folder of its name"),
    "--alpha": number(ranges.ALPHA, "lora_alpha (twice the rank)"),
    "--autocast": FLAG | dict(help="matrix products in bfloat16 whatever the weights are"),
    "--beta": number(
        ranges.NOT_NEGATIVE, "how strongly a run is held to its start, for dpo (0.1, never 0) and for grpo (0)"
    ),
    "--base": dict(type=a_path, default=BASE, help="a model folder, a GGUF file, or a name that get knows"),
    "--batch-size": number(ranges.BATCH_SIZE, "sequences per step (16, of instruction data 8)"),
    "--block-size": dict(type=int, choices=BLOCK_SIZES, default=QLORA.block_size, help="weights with one scale"),
    "--chat": dict(nargs="?", type=a_text, const=CONVERSE, metavar="QUESTION", help="answer it; without one, converse"),
    "--count": number(ranges.COUNT, "held-out examples at most, to validate and to score", default=HELD_OUT),
    "--counted-tokens": number(ranges.COUNTED, "of each sequence, in the loss (all but the first)"),
    "--data": dict(type=a_name, help=DATA_HELP),
    "--device": dict(choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the best that is here"),
    "--devices": number(DEVICES, "that share the rows of the batch", default=1),
    "--double-quant": SWITCH | dict(default=QLORA.double_quant, help="8-bit scales"),
    "--dropout": number(ranges.DROPOUT, "lora_dropout", default=0.0),
    "--dtype": dict(
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the base's weights (auto: bfloat16 where the base has it and nothing of it is trained, else float32)",
    ),
    "--escapes": FLAG | dict(help="\\n, \\t and \\\\ in the prompt or question are a newline, a tab and a backslash"),
    "--force": FLAG | dict(help="load an adapter that was trained on another base"),
    "--gradient-checkpointing": FLAG | dict(help="keep less for backward, compute it again"),
    "--group-by-length": SWITCH | dict(help="batches of rows of like length: less padding"),
    "--group-size": number(ranges.GROUP_SIZE, f"of grpo, samples of a prompt ({GROUP})"),
    "--host": dict(type=a_name, default="127.0.0.1", help="the address to listen on; 0.0.0.0 is all, for everybody"),
    "--learning-rate": number(ranges.LEARNING_RATE, "instead of the tuned one"),
    "--loraplus-ratio": number(ranges.LORAPLUS_RATIO, "B's rate over A's", default=Experiment.loraplus_ratio),
    "--max-queue": number(ranges.BATCH_SIZE, "requests that may wait", default=64),
    "--max-new-tokens": number(ranges.NEW_TOKENS, "64, for an answer of a chat 512"),
    "--method": dict(choices=METHODS, default="lora", help="which parameters are trained, and how"),
    "--methods": dict(type=method_list, default=",".join(DEFAULT_METHODS), help=f"of {', '.join(METHODS)}"),
    "--model": dict(choices=PRESETS, default="llama-2-7b", help="a known shape"),
    "--objective": dict(
        choices=OBJECTIVES, default="sft", help="given answers, preferred ones, rewarded ones, a teacher's word"
    ),
    "--out": dict(type=a_path, help="the folder to write"),
    "--overwrite": FLAG | dict(help="replace what --out holds, also a model by an adapter or an adapter by a model"),
    "--port": number(ranges.PORT, "0 takes a free one", default=8000),
    "--precision": dict(choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on CUDA"),
    "--quantize": dict(choices=("auto", "none", *LEVELS), default="auto", help="the base in 4 bits (auto: as trained)"),
    "--rank": number(ranges.RANK, default=8),
    "--resume": FLAG | dict(help="continue the run whose state is under --out"),
    "--rounds": number(ranges.ROUNDS, "of the actions in turn (5; of a real model 3)"),
    "--save-every": number(ranges.EVERY, "steps between saved states, 0 for the last alone", default=50),
    "--scale": dict(choices=BASES, help="shipped base, real model, or a shape (run: tiny; show: all there are)"),
    "--shard": FLAG
    | dict(dest="sharded", help="with torchrun: cut the base among the devices, for one that is too large for each"),
    "--scheme": dict(choices=LEVELS, default=QLORA.scheme, help="4 bits of the base, qlora and loftq"),
    "--seed": number(ranges.SEED, default=0),
    "--seeds": number(ranges.SEEDS, "how many seeds, counted up from --seed", default=1),
    "--sequence-length": number(ranges.ROW, "tokens per row of text, and of an example at most", default=128),
    "--show": dict(type=a_path, metavar="FILE", help="print the tables of a file that --out wrote"),
    "--small": FLAG | dict(help="the run of --device cuda at a tiny shape, on any device: does it work?"),
    "--steps": number(ranges.STEPS, "optimizer steps (150, of instruction data 30 or four passes)"),
    "--targets": dict(type=a_name, default="all-linear", help="q_proj,v_proj or a regular expression or all-linear"),
    "--task": dict(choices=TASKS),
    "--teacher": dict(type=a_path, help="of distill: a model as --base takes it, or an adapter folder on the base"),
    "--temperature": number(ranges.TEMPERATURE, "0 takes the likeliest token", default=0.0),
    "--top-k": number(ranges.TOP_K, "only the likeliest tokens"),
    "--top-p": number(ranges.TOP_P, "only the likeliest tokens, of this probability together"),
    "--tune": FLAG | dict(help="choose learning rates on the grid and store them"),
    "--virtual-tokens": number(ranges.VIRTUAL_TOKENS, "of soft-prompt and prefix", default=Experiment.virtual_tokens),
    "action": dict(nargs="?", choices=("list", "run", "show"), default="list", help="what to do with the ledger"),
    "claim": dict(nargs="?", type=a_name, help="the name of a claim, or of a study, to run or to show"),
    "file": dict(type=a_path, help="a GGUF file"),
    "name": dict(choices=SOURCES, help="of the model"),
    "prompt": dict(nargs="?", type=a_text, help='for example "The quick brown fox"'),
}
# By verb, the options that differ from the table above.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "compare": {"--task": dict(help=f"of the tiny world ({TASK})"), "--out": dict(default=Path("runs/compare"))},
    "finetune": {
        "--task": dict(help=f"of the tiny world ({TASK})"),
        "--data": dict(help=f"{DATA_HELP}; for dpo {', '.join(PAIRS)}, or FILE.jsonl of prompt, chosen, rejected"),
        "--adapter": dict(help="go on from this trained adapter, merged into the base"),
        "--out": dict(default=Path("runs/finetune")),
    },
    "pretrain": {
        "--steps": number(ranges.PRETRAINING_STEPS, "optimizer steps", default=9000),
        "--out": dict(default=Path("runs/base")),
    },
    "convert": {"--out": dict(required=True)},
    "generate": {"--adapter": dict(action="append", help="an adapter folder; more than one for a conversation")},
    "evaluate": {
        "--count": number(ranges.COUNT, "questions of each kind"),
        "--task": dict(help="its questions instead of those of the world"),
    },
    "serve": {
        "--batch-size": number(ranges.BATCH_SIZE, "requests that run together", default=16),
        "--max-new-tokens": number(ranges.NEW_TOKENS, "of one answer, at most", default=512),
    },
    "claims": {"--seeds": number(ranges.PAIRS, "how many seeds of each arm (as planned)", default=None)},
    "bench": {
        "--base": dict(default=None, help="a real model instead: a folder, a GGUF file, or a name that get knows"),
        "--device": dict(help="cuda: check and measure the device"),
        "--out": dict(help="a new JSON file, written after each section of --device cuda or --small"),
    },
    "merge": {
        "--adapter": dict(required=True),
        "--dtype": dict(help="of the weights that are written (auto: the base's own)"),
        "--out": dict(default=Path("runs/merged")),
    },
    "memory": {
        "--base": dict(default=None, help="a model folder in Llama layout instead; only its config.json is read"),
        "--dtype": dict(choices=SIMULATED_DTYPES, default="bfloat16"),
        "--method": dict(choices=SIMULATED_METHODS),
        "--objective": dict(choices=SIMULATED_OBJECTIVES, help="dpo: pairs of sequences, reference with adapter off"),
        "--targets": dict(default="q_proj,v_proj"),
        "--batch-size": dict(default=1),
        "--sequence-length": number(ranges.SEQUENCE, "tokens", default=2048),
    },
}
ADAPTER = ("--base", "--adapter", "--force", "--quantize")
LORA = ("--rank", "--targets", "--scheme", "--block-size", "--double-quant")
DATA = ("--base", "--task", "--data", "--count", "--sequence-length", "--out")
STEPS = ("--steps", "--batch-size", "--learning-rate")
TRAINING = (*DATA, *STEPS, "--dtype", *LORA, "--alpha", "--dropout", "--virtual-tokens", "--loraplus-ratio")
LOOP = ("--accumulation-steps", "--gradient-checkpointing", "--group-by-length", "--precision")
ONE_RUN = ("--method", "--resume", "--overwrite", "--save-every", "--shard", *LOOP)
GOALS = ("--objective", "--beta", "--group-size", "--teacher", "--adapter")
TOKENS = ("--max-new-tokens", "--temperature", "--top-k", "--top-p")
SHAPE = ("--model", "--base", "--method", "--batch-size", "--sequence-length", "--counted-tokens", "--objective")
WAYS = ("--dtype", "--autocast", "--gradient-checkpointing", "--accumulation-steps")
SERVER = ("--host", "--port", "--batch-size", "--max-queue", "--max-new-tokens")
# By verb, its options; all have --seed and --device.
VERBS = {
    "compare": (*TRAINING, "--methods", "--seeds", "--tune"),
    "finetune": (*TRAINING, *ONE_RUN, *GOALS),
    "pretrain": ("--out", "--steps", "--resume"),
    "generate": ("prompt", "--chat", *ADAPTER, "--dtype", "--escapes", *TOKENS),
    "memory": (*SHAPE, *LORA, *WAYS, "--devices", "--shard"),
    "merge": (*ADAPTER, "--dtype", "--out", "--overwrite"),
    "evaluate": (*ADAPTER, "--dtype", "--task", "--count"),
    "serve": ("--base", "--adapters", "--force", "--quantize", "--dtype", *SERVER),
    "bench": ("--rounds", "--base", "--small", "--out", "--show"),
    "get": ("name",),
    "convert": ("file", "--out", "--overwrite"),
    "claims": ("action", "claim", "--scale", "--seeds"),
}
# Each pair excludes the other.
EXCLUSIVE = (("--task", "--data"), ("--model", "--base"), ("--learning-rate", "--tune"))


def device_of(options) -> str:
    """The device that was asked for; for "auto" the first one that is here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in here if here[name]) if options.device == "auto" else options.device
    if not here[device]:
        raise ValueError(f"device {device} is not available here; --device cpu always is")
    return device


def targets_of(text: str) -> list[str] | str:
    """ "q_proj,v_proj" is a list of suffixes, "all-linear" a word of its own, all else a regular expression."""
    if text == "all-linear" or not all(part.replace("_", "").isalnum() for part in text.split(",")):
        return text
    return text.split(",")
