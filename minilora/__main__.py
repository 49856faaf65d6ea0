"""The command line: `python -m minilora [verb] [options]`; without a verb, `compare`.

Each verb is a function below that hands its options to the package. Bad input ends with one sentence and exit status 2.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minilora.command import run_command
from minilora.config import LoRAConfig
from minilora.experiments import bench as benchmarks
from minilora.experiments.compare import compare as compare_methods
from minilora.experiments.merge import merge_adapter
from minilora.experiments.methods import DEFAULT_METHODS, METHODS, BaseFolder, Experiment
from minilora.experiments.pretrain import pretrain as pretrain_base
from minilora.experiments.run import BASE, copy_tokenizer, open_base, schedule, tuned_learning_rate
from minilora.experiments.run import finetune as finetune_method
from minilora.experiments.simulate import SIMULATED_DTYPES, SIMULATED_METHODS, simulate
from minilora.experiments.tune import grid_of, tune
from minilora.inference.evaluate import evaluate_world, score_task
from minilora.inference.generate import generate as generate_tokens
from minilora.levels import LEVELS
from minilora.presets import PRESETS
from minilora.quant import QLORA, Quantization
from minilora.storage.adapters import load_adapter
from minilora.storage.config import load_config
from minilora.storage.files import make_folder
from minilora.storage.peft import base_quantization, peft_type
from minilora.storage.prompts import PROMPTS, load_prompt
from minilora.text.datasets import PYTHON_CODE, load_dataset
from minilora.text.tasks import TASKS, load_task

RUN_OPTIONS = ("accumulation_steps", "gradient_checkpointing", "precision", "save_every")  # of TrainConfig, by name


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


def quantization_of(options) -> Quantization:
    return Quantization(options.scheme, options.block_size, options.double_quant)


def base_of(options) -> BaseFolder:
    return open_base(options.base, device_of(options))


def experiments_of(options, methods: list[str]) -> list[Experiment]:
    """One for each method, all of the same base and data; a rate that is not given is the method's tuned one."""
    base = base_of(options)
    dataset = load_dataset(options.data or options.task, base.tokenizer, options.sequence_length)
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    lora = LoRAConfig(options.rank, alpha, options.dropout, targets_of(options.targets))
    chosen = {name: getattr(options, name) for name in RUN_OPTIONS if hasattr(options, name)}
    experiments = []
    details = lora, quantization_of(options), options.virtual_tokens, options.loraplus_ratio
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        rate = options.learning_rate
        if rate is None:
            rate = grid_of(method)[0] if getattr(options, "tune", False) else tuned_learning_rate(dataset.name, method)
        training = schedule(options.steps, rate, options.batch_size, options.seed, **chosen)
        experiments.append(Experiment(base, dataset, method, training, *details))
    return experiments


def compare(options):
    """Several methods (full,lora,qlora) from the same base on the same data: a table, figures and results.json."""
    experiments = experiments_of(options, options.methods.split(","))
    if options.tune:
        for method, choice in tune(experiments).items():
            print(method, choice)
    else:
        compare_methods(experiments, list(range(options.seed, options.seed + options.seeds)), options.out)
        print(f"\nfigures, results.json and what was trained are in {options.out}")


def pretrain(options):
    """Rebuilds the shipped base from nothing: tokenizer, model and record.json."""
    record = pretrain_base(options.out, options.steps, options.seed, device_of(options), options.resume)
    print(f"{record['tokens']:,d} tokens in {record['wall_seconds'] / 60:.0f} minutes; {record['evaluation']}")


def finetune(options):
    """One method on one data set; writes an adapter or a model. --resume goes on after a kill."""
    (experiment,) = experiments_of(options, [options.method])
    for name, value in finetune_method(experiment, options.out, options.resume).items():
        print(f"{name:<22}{value}")


def generate(options):
    """Text from a base, with or without an adapter, in floats or in 4 bits."""
    base = base_of(options)
    model = load_with_adapter(base, options)
    prompt = [base.tokenizer.bos_id, *base.tokenizer.encode(options.prompt.replace("\\n", "\n"))]
    sampling = options.temperature, options.top_k, options.top_p, options.seed
    (ids,) = generate_tokens(model, [prompt], options.max_new_tokens, *sampling, base.tokenizer.eos_id)
    print(base.tokenizer.decode(prompt[1:] + ids))


def memory(options):
    """The bytes of a fine-tune at any size, from the real training step on fake tensors."""
    print(f"simulating one training step of {options.base or options.model} ...", file=sys.stderr)
    config = load_config(options.base) if options.base else options.model
    sizes = options.method, options.batch_size, options.sequence_length, options.dtype, options.autocast
    more = dict(r=options.rank, target_modules=targets_of(options.targets), quantization=quantization_of(options))
    for name in ("gradient_checkpointing", "accumulation_steps"):
        more[name] = getattr(options, name)
    print(simulate(config, *sizes, **more).table())


def merge(options):
    """An adapter into its base, written as a plain model folder."""
    if peft_type(options.adapter) in PROMPTS:
        raise ValueError(f"{options.adapter} holds a prompt, which is input and changes no weight: nothing to merge")
    base = base_of(options)
    make_folder(options.out)
    report = merge_adapter(load_with_adapter(base, options), options.out)
    copy_tokenizer(base, options.out)
    print(f"merged {options.adapter} into {options.base}: {options.out}\n{report.text()}")


def evaluate(options):
    """A base, with or without an adapter, against the world's scorers and the entropy floor."""
    base = base_of(options)
    model = load_with_adapter(base, options)
    if options.task:
        scored = score_task(model, base.tokenizer, load_task(options.task), options.count)
        print(f"{options.task}: score {scored.score:.3f}")
    else:
        print(evaluate_world(model, base.tokenizer, options.count).table())


def bench(options):
    """The speed ratios we claim, each beside its bar."""
    settings = benchmarks.BenchSettings(rounds=options.rounds, seed=options.seed)
    print(benchmarks.format_bench(benchmarks.run_bench(settings), settings))


def load_with_adapter(base: BaseFolder, options):
    """The base as --quantize says, and by default as the adapter's base was when the adapter was trained."""
    if options.quantize == "auto":
        quantization = base_quantization(options.adapter) if options.adapter else None
    else:
        quantization = None if options.quantize == "none" else Quantization(options.quantize)
    model = base.load(quantization)
    if not options.adapter:
        return model
    load = load_prompt if peft_type(options.adapter) in PROMPTS else load_adapter
    return load(model, options.adapter, options.force)


ADAPTER = ("--base", "--adapter", "--force", "--quantize")
LORA = ("--rank", "--targets", "--scheme", "--block-size", "--double-quant")
DATA = ("--base", "--task", "--data", "--sequence-length", "--out", "--steps", "--batch-size", "--learning-rate")
TRAINING = (*DATA, *LORA, "--alpha", "--dropout", "--virtual-tokens", "--loraplus-ratio")
ONE_RUN = ("--method", "--resume", "--save-every", "--accumulation-steps", "--gradient-checkpointing", "--precision")
SHAPE = ("--model", "--base", "--method", "--batch-size", "--sequence-length")
WAYS = ("--dtype", "--autocast", "--gradient-checkpointing", "--accumulation-steps")
# By verb, its options; all have --seed and --device.
VERBS = {
    compare: (*TRAINING, "--methods", "--seeds", "--tune"),
    finetune: (*TRAINING, *ONE_RUN),
    pretrain: ("--out", "--steps", "--resume"),
    generate: ("prompt", *ADAPTER, "--max-new-tokens", "--temperature", "--top-k", "--top-p"),
    memory: (*SHAPE, *LORA, *WAYS),
    merge: (*ADAPTER, "--out"),
    evaluate: (*ADAPTER, "--task", "--count"),
    bench: ("--rounds",),
}
FLAG, SWITCH = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
OPTIONS: dict[str, dict[str, Any]] = {
    "--accumulation-steps": dict(type=int, default=1, help="micro-batches the batch is cut into"),
    "--adapter": dict(type=Path, help="an adapter folder in PEFT layout"),
    "--alpha": dict(type=float, help="lora_alpha (twice the rank)"),
    "--autocast": FLAG | dict(help="matrix products in bfloat16 whatever the weights are"),
    "--base": dict(type=Path, default=BASE, help="a model folder in Llama layout"),
    "--batch-size": dict(type=int, default=16, help="sequences per step"),
    "--block-size": dict(type=int, default=QLORA.block_size, help="weights with one scale"),
    "--count": dict(type=int, default=200, help="questions of each kind"),
    "--data": dict(help=f"real text instead of a task: {PYTHON_CODE}, or a UTF-8 file"),
    "--device": dict(choices=("auto", "cpu", "cuda", "mps"), default="auto"),
    "--double-quant": SWITCH | dict(default=QLORA.double_quant, help="8-bit scales"),
    "--dropout": dict(type=float, default=0.0, help="lora_dropout"),
    "--dtype": dict(choices=SIMULATED_DTYPES, default="bfloat16", help="of the weights"),
    "--force": FLAG | dict(help="load an adapter that was trained on another base"),
    "--gradient-checkpointing": FLAG | dict(help="keep less for backward, compute it again"),
    "--learning-rate": dict(type=float, help="instead of the tuned one"),
    "--loraplus-ratio": dict(type=float, default=Experiment.loraplus_ratio, help="B's rate over A's"),
    "--max-new-tokens": dict(type=int, default=64),
    "--method": dict(choices=METHODS, default="lora"),
    "--methods": dict(default=",".join(DEFAULT_METHODS), help=f"of {', '.join(METHODS)}"),
    "--model": dict(choices=PRESETS, default="llama-2-7b"),
    "--out": dict(type=Path),
    "--precision": dict(choices=("auto", "float32", "bfloat16"), default="auto"),
    "--quantize": dict(choices=("auto", "none", *LEVELS), default="auto", help="the base in 4 bits (auto: as trained)"),
    "--rank": dict(type=int, default=8),
    "--resume": FLAG | dict(help="continue the run whose state is under --out"),
    "--rounds": dict(type=int, default=5),
    "--save-every": dict(type=int, default=50, help="steps between saved states"),
    "--scheme": dict(choices=LEVELS, default=QLORA.scheme, help="4 bits of the base, qlora and loftq"),
    "--seed": dict(type=int, default=0),
    "--seeds": dict(type=int, default=1, help="how many seeds, counted up from --seed"),
    "--sequence-length": dict(type=int, default=128, help="tokens per row of text"),
    "--steps": dict(type=int, default=150, help="optimizer steps"),
    "--targets": dict(default="all-linear", help="q_proj,v_proj or a regular expression or all-linear"),
    "--task": dict(help=f"one of {', '.join(TASKS)}"),
    "--temperature": dict(type=float, default=0.0),
    "--top-k": dict(type=int),
    "--top-p": dict(type=float),
    "--tune": FLAG | dict(help="choose learning rates on the grid and store them"),
    "--virtual-tokens": dict(type=int, default=Experiment.virtual_tokens, help="of soft-prompt and prefix"),
    "prompt": dict(help='for example "Instruction: List three animals.\\nAnswer:"'),
}
# By verb, the options that differ from the table above.
CHANGES: dict[Callable, dict[str, dict[str, Any]]] = {
    compare: {"--task": dict(default="json"), "--out": dict(default=Path("runs/compare"))},
    finetune: {"--task": dict(default="json"), "--out": dict(default=Path("runs/finetune"))},
    pretrain: {"--steps": dict(default=9000), "--out": dict(default=Path("runs/base"))},
    merge: {"--adapter": dict(required=True), "--out": dict(default=Path("runs/merged"))},
    memory: {
        "--base": dict(default=None, help="a model folder in Llama layout instead; only its config.json is read"),
        "--method": dict(choices=SIMULATED_METHODS),
        "--targets": dict(default="q_proj,v_proj"),
        "--batch-size": dict(default=1),
        "--sequence-length": dict(default=2048),
    },
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minilora", description=(__doc__ or "").split("\n\n")[0])
    verbs = parser.add_subparsers(dest="verb", metavar="verb")
    for function, names in VERBS.items():
        words: dict[str, Any] = dict(help=function.__doc__, description=function.__doc__)
        words["formatter_class"] = argparse.ArgumentDefaultsHelpFormatter
        verb = verbs.add_parser(function.__name__, **words)
        verb.set_defaults(run=function)
        for name in ("--seed", "--device", *names):
            verb.add_argument(name, **{**OPTIONS[name], **CHANGES.get(function, {}).get(name, {})})
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    return run_command(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
