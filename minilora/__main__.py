"""The command line: `python -m minilora [verb] [options]`; without a verb, `compare`.

Each verb is a function below that parses nothing and computes nothing: it hands its options to the package. Bad
input ends with one sentence and exit status 2.
"""

import argparse
import sys
from pathlib import Path

import torch

from minilora.experiments import bench as benchmarks
from minilora.experiments.compare import compare as compare_methods
from minilora.experiments.compare import tune
from minilora.experiments.finetune import (
    BASE,
    Base,
    copy_tokenizer,
    open_base,
    run_config,
    tuned_learning_rate,
)
from minilora.experiments.finetune import finetune as finetune_method
from minilora.experiments.merge import merge_adapter
from minilora.experiments.methods import DEFAULT_METHODS, METHODS, Extras
from minilora.experiments.pretrain import pretrain as pretrain_base
from minilora.experiments.simulate import DTYPES, QUANTIZATION, simulate
from minilora.experiments.simulate import METHODS as SIMULATED
from minilora.inference.evaluate import evaluate_world, score_task
from minilora.inference.generate import generate as generate_tokens
from minilora.levels import LEVELS
from minilora.lora import LoRAConfig
from minilora.model import GPT
from minilora.presets import PRESETS
from minilora.storage.adapters import base_quantization, load_adapter
from minilora.storage.config import load_config
from minilora.storage.files import make_folder
from minilora.storage.prompts import METHODS as PROMPTS
from minilora.storage.prompts import load_prompt, method_of
from minilora.text.datasets import PYTHON_CODE, load_dataset
from minilora.text.tasks import TASKS

BATCH_SIZE = 16  # sequences
STEPS = 150
SEQUENCE_LENGTH = 128  # tokens, of text; an example of a task is as long as it is


def device_of(options) -> str:
    if options.device != "auto":
        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not available[options.device]:
            raise ValueError(f"device {options.device} is not available here; --device cpu always is")
        return options.device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def lora_of(options) -> LoRAConfig:
    alpha = options.alpha if options.alpha is not None else 2 * options.rank
    return LoRAConfig(options.rank, alpha, options.dropout, targets_of(options.targets))


def targets_of(text: str) -> list[str] | str:
    """ "q_proj,v_proj" is a list of suffixes, "all-linear" a word of its own, all else a regular expression."""
    if text == "all-linear" or not all(part.replace("_", "").isalnum() for part in text.split(",")):
        return text
    return text.split(",")


def quantization_of(options) -> dict:
    return {"scheme": options.scheme, "block_size": options.block_size, "double_quant": options.double_quant}


def extras_of(options) -> Extras:
    return Extras(options.virtual_tokens, options.loraplus_ratio)


def base_of(options) -> Base:
    return open_base(options.base, device_of(options))


def dataset_of(options, base: Base):
    return load_dataset(options.data or options.task, base.tokenizer, options.sequence_length)


def compare(options):
    """Several methods (full,lora,qlora) from the same base on the same data: a table, figures and results.json."""
    base = base_of(options)
    dataset = dataset_of(options, base)
    lora, methods = lora_of(options), options.methods.split(",")
    how = quantization_of(options), extras_of(options)
    if options.tune:
        tuned = tune(base, dataset, methods, lora, options.steps, options.batch_size, *how)
        for method, choice in tuned.items():
            print(method, choice)
        return
    seeds = [options.seed + number for number in range(options.seeds)]
    rates = {method: options.learning_rate for method in methods} if options.learning_rate else None
    compare_methods(base, dataset, methods, lora, options.steps, options.batch_size, seeds, options.out, rates, *how)
    print(f"\nfigures, results.json and what was trained are in {options.out}")


def pretrain(options):
    """Rebuilds the shipped base from nothing: tokenizer, model and record.json."""
    device = device_of(options)
    record = pretrain_base(options.out, options.steps, options.seed, device, options.resume)
    print(f"{record['tokens']:,d} tokens in {record['wall_seconds'] / 60:.0f} minutes; {record['evaluation']}")


def finetune(options):
    """One method on one data set; writes an adapter or a model. --resume goes on after a kill."""
    base = base_of(options)
    dataset = dataset_of(options, base)
    rate = options.learning_rate or tuned_learning_rate(dataset.name, options.method)
    config = run_config(
        options.steps,
        rate,
        options.batch_size,
        options.seed,
        accumulation_steps=options.accumulation_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        precision=options.precision,
        save_every=options.save_every,
    )
    lora, how = lora_of(options), (quantization_of(options), extras_of(options))
    summary = finetune_method(base, dataset, options.method, lora, config, options.out, *how, options.resume)
    for name, value in summary.items():
        print(f"{name:<22}{value}")


def generate(options):
    """Text from a base, with or without an adapter, in floats or in 4 bits."""
    base = base_of(options)
    model = load_with_adapter(base, options)
    prompt = [base.tokenizer.bos_id, *base.tokenizer.encode(options.prompt.replace("\\n", "\n"))]
    (ids,) = generate_tokens(
        model,
        [prompt],
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        base.tokenizer.eos_id,
    )
    print(base.tokenizer.decode(prompt[1:] + ids))


def memory(options):
    """The bytes of a fine-tune at any size, from the real training step on fake tensors."""
    print(f"simulating one training step of {options.base or options.model} ...", file=sys.stderr)
    report = simulate(
        load_config(options.base) if options.base else options.model,
        options.method,
        options.batch_size,
        options.sequence_length,
        options.dtype,
        options.autocast,
        r=options.rank,
        target_modules=targets_of(options.targets),
        gradient_checkpointing=options.gradient_checkpointing,
        accumulation_steps=options.accumulation_steps,
        quantization=quantization_of(options),
    )
    print(report.table())


def merge(options):
    """An adapter into its base, written as a plain model folder."""
    if method_of(options.adapter) in PROMPTS:
        raise ValueError(
            f"{options.adapter} holds a prompt, which is input and no change of a weight: nothing to merge"
        )
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
        dataset = load_dataset(options.task, base.tokenizer, SEQUENCE_LENGTH)
        if dataset.task is None:
            raise ValueError(f"unknown task {options.task!r}; known: {', '.join(TASKS)}")
        print(f"{options.task}: score {score_task(model, base.tokenizer, dataset.task, options.count).score:.3f}")
    else:
        print(evaluate_world(model, base.tokenizer, options.count).table())


def bench(options):
    """The speed ratios we claim, each beside its bar."""
    settings = benchmarks.BenchSettings(rounds=options.rounds, seed=options.seed)
    print(benchmarks.format_bench(benchmarks.run_bench(settings), settings))


def load_with_adapter(base: Base, options) -> GPT:
    """The base as --quantize says, and by default as the adapter's base was when the adapter was trained."""
    if options.quantize == "auto":
        model = base.load(base_quantization(options.adapter) if options.adapter else None)
    else:
        model = base.load(None if options.quantize == "none" else QUANTIZATION | {"scheme": options.quantize})
    if not options.adapter:
        return model
    load = load_prompt if method_of(options.adapter) in PROMPTS else load_adapter
    return load(model, options.adapter, options.force)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minilora", description=__doc__.split("\n\n")[0])
    verbs = parser.add_subparsers(dest="verb", metavar="verb")

    def verb(function) -> argparse.ArgumentParser:
        added = verbs.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        added.set_defaults(run=function)
        added.add_argument("--seed", type=int, default=0)
        added.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
        return added

    def base_options(added):
        added.add_argument("--base", type=Path, default=BASE, help="a model folder in Llama layout (the shipped base)")

    def adapter_options(added, required=False):
        added.add_argument("--adapter", type=Path, required=required, help="an adapter folder in PEFT layout")
        added.add_argument("--force", action="store_true", help="load an adapter that was trained on another base")
        choices = ("auto", "none", *LEVELS)
        help = "keep the base in 4 bits, or not (auto: as it was when the adapter was trained)"
        added.add_argument("--quantize", choices=choices, default="auto", help=help)

    def quantization_options(added):
        added.add_argument(
            "--scheme", choices=LEVELS, default=QUANTIZATION["scheme"], help="4 bits of the base, qlora and loftq"
        )
        added.add_argument("--block-size", type=int, default=QUANTIZATION["block_size"], help="weights with one scale")
        added.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=True, help="8-bit scales")

    def lora_options(added, targets="all-linear"):
        added.add_argument("--rank", type=int, default=8)
        added.add_argument("--targets", default=targets, help="q_proj,v_proj or a regular expression or all-linear")

    def training_options(added):
        added.add_argument("--task", default="json", help=f"one of {', '.join(TASKS)} (json)")
        added.add_argument("--data", help=f"real text instead of a task: {PYTHON_CODE}, or a UTF-8 file")
        added.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps ({STEPS})")
        added.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"sequences per step ({BATCH_SIZE})")
        added.add_argument("--sequence-length", type=int, default=SEQUENCE_LENGTH, help="tokens per row of text")
        added.add_argument("--learning-rate", type=float, help="instead of the tuned one")
        added.add_argument("--alpha", type=float, help="lora_alpha (twice the rank)")
        added.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
        added.add_argument(
            "--virtual-tokens", type=int, default=Extras.virtual_tokens, help="of soft-prompt and prefix"
        )
        added.add_argument("--loraplus-ratio", type=float, default=Extras.loraplus_ratio, help="B's rate over A's")

    for function in (compare, finetune):
        added = verb(function)
        base_options(added)
        training_options(added)
        lora_options(added)
        quantization_options(added)
        added.add_argument("--out", type=Path, default=Path("runs") / function.__name__)
        if function is compare:
            added.add_argument("--methods", default=",".join(DEFAULT_METHODS), help=f"of {', '.join(METHODS)}")
            added.add_argument("--seeds", type=int, default=1, help="how many seeds, counted up from --seed")
            added.add_argument("--tune", action="store_true", help="choose learning rates on the grid and store them")
        else:
            added.add_argument("--method", choices=METHODS, default="lora")
            added.add_argument("--resume", action="store_true", help="continue the run whose state is under --out")
            added.add_argument("--save-every", type=int, default=50, help="steps between saved states")
            added.add_argument("--accumulation-steps", type=int, default=1)
            added.add_argument("--gradient-checkpointing", action="store_true")
            added.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")

    added = verb(pretrain)
    added.add_argument("--out", type=Path, default=Path("runs/base"))
    added.add_argument("--steps", type=int, default=9000)
    added.add_argument("--resume", action="store_true")

    added = verb(generate)
    base_options(added)
    adapter_options(added)
    added.add_argument("prompt", help='for example "Instruction: List three animals.\\nAnswer:"')
    added.add_argument("--max-new-tokens", type=int, default=64)
    added.add_argument("--temperature", type=float, default=0.0)
    added.add_argument("--top-k", type=int)
    added.add_argument("--top-p", type=float)

    added = verb(memory)
    lora_options(added, targets="q_proj,v_proj")
    quantization_options(added)
    added.add_argument("--model", choices=PRESETS, default="llama-2-7b")
    added.add_argument("--base", type=Path, help="a model folder in Llama layout instead; only its config.json is read")
    added.add_argument("--method", choices=SIMULATED, default="lora")
    added.add_argument("--batch-size", type=int, default=1)
    added.add_argument("--sequence-length", type=int, default=2048)
    added.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    added.add_argument("--autocast", action="store_true", help="matrix products in bfloat16 whatever the weights are")
    added.add_argument("--gradient-checkpointing", action="store_true")
    added.add_argument("--accumulation-steps", type=int, default=1, help="micro-batches the batch is cut into")

    added = verb(merge)
    base_options(added)
    adapter_options(added, required=True)
    added.add_argument("--out", type=Path, default=Path("runs/merged"))

    added = verb(evaluate)
    base_options(added)
    adapter_options(added)
    added.add_argument("--task", help=f"score one task ({', '.join(TASKS)}) instead of the world")
    added.add_argument("--count", type=int, default=200, help="questions of each kind")

    added = verb(bench)
    added.add_argument("--rounds", type=int, default=5)
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
