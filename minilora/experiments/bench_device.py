"""One run that measures a device: is every fast path right there, what does a step cost, is the simulation true.

Made for a GPU that is lent for a few minutes: all in one go, each section by itself. Where one fails, out of memory or
by a library's fault, its sentence stands in the file and the rest goes on. The file is written after every section, so
that a kill costs no more than the section under way. `device_report` makes the tables.

The shape is TinyLlama's, 1.1 billion parameters, with a batch of 8 x 512 tokens: 25 TFLOP a step of full fine-tuning,
so that a GPU is busy and not only the queue in front of it. Products in float32 are float32's, never TF32's.
"""

import datetime
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.inject import merge_lora
from minilora.experiments import peers
from minilora.experiments.bench import BenchSettings, serving, step_of
from minilora.experiments.device_checks import Place, check_paths
from minilora.experiments.device_memory import memory_row
from minilora.experiments.device_report import failed, section_text
from minilora.experiments.timing import Actions, ratios_to_first, seconds_in_turn
from minilora.inference.generate import generate
from minilora.model import GPT, GPTConfig
from minilora.storage.files import write_json

Rows = Iterator[dict[str, Any]]


@dataclass
class DeviceSettings(BenchSettings):
    """What is measured; the defaults are for a GPU of 80 GB."""

    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    vocab_size: int = 32000
    batch_size: int = 8
    sequence_length: int = 512
    rounds: int = 5
    check_width: int = 1024
    prompt_length: int = 128
    new_tokens: int = 32
    decoded_rows: tuple[int, ...] = (1, 16)
    serving_length: int = 256  # a quarter goes through forward, a sixteenth is generated
    large: str = "llama-2-7b"  # the preset whose QLoRA step is measured
    large_tokens: int = 2048

    def methods(self) -> dict[str, GPT]:
        """By name, a model for each method; the first is the one that the others are held against."""
        return {
            "full": self.build_model(),
            "LoRA, q_proj and v_proj": self.build_lora_model(["q_proj", "v_proj"]),
            "LoRA, all linears": self.build_lora_model(),
            "LoRA, dropout 0.05": self.build_lora_model(dropout=0.05),
            "DoRA": self.build_lora_model(use_dora=True),
            "QLoRA": self.build_lora_model(in_4_bits=True),
        }


def small_settings(**chosen: Any) -> DeviceSettings:
    """A shape at which everything runs in seconds on a CPU. What it measures means nothing."""
    sizes: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    sizes |= dict(num_key_value_heads=2, batch_size=2, sequence_length=64, rounds=1, check_width=32, serving_rows=4)
    sizes |= dict(prompt_length=8, new_tokens=4, serving_length=64, large="base", large_tokens=64)
    return DeviceSettings(**{**sizes, "decoded_rows": (1, 2), **chosen})


# Sections


def correctness(settings: DeviceSettings) -> Rows:
    """Every fast path against the plain formula."""
    return check_paths(Place(settings.device, settings.check_width))


def timed(actions: Actions, settings: DeviceSettings, tokens: int, **more: Any) -> Rows:
    """A row for each action, all in turn: its median time, tokens per second, and its ratio to the first's."""
    seconds = seconds_in_turn(actions, settings, next(reversed(actions)))
    ratios, first = ratios_to_first(seconds), next(iter(actions))
    for name, values in seconds.items():
        own = ratios.get(name, [1.0])
        median = statistics.median(values)
        row = {"name": name, "seconds": median, "tokens_per_second": tokens / median}
        yield {**row, "over": first, "ratio": statistics.median(own), "lowest": min(own), "highest": max(own), **more}


def steps(settings: DeviceSettings, precision: str) -> Rows:
    """A training step of each method over full fine-tuning's; weights in float32."""
    ids = settings.random_ids(settings.batch_size, settings.sequence_length)
    actions = {name: step_of(model, ids, ids, precision) for name, model in settings.methods().items()}
    yield from timed(actions, settings, ids.numel())


def steps_over_peers(settings: DeviceSettings, precision: str) -> Rows:
    """Our steps over those of transformers and PEFT; no rows where these are not installed."""
    if not peers.installed():
        return
    ids = settings.random_ids(settings.batch_size, settings.sequence_length)
    with peers.quiet():
        for theirs, r, build in (
            ("PEFT's LoRA, all linears", settings.r, settings.build_lora_model),
            ("transformers' full", None, settings.build_model),
        ):
            model = peers.make(settings.shape, settings.device, r)
            actions: Actions = {theirs: peers.training_step_of(model, ids, ids, precision == "bfloat16")}
            actions[f"ours, over {theirs}"] = step_of(build(), ids, ids, precision)
            yield from timed(actions, settings, ids.numel())
            del model, actions
            free()


def memory(settings: DeviceSettings) -> Rows:
    """Simulated and measured bytes of a step in bfloat16, each method with and without checkpointing."""
    for method in ("full", "lora", "qlora"):
        for checkpointing in (False, True):
            sizes = settings.batch_size, settings.sequence_length
            yield memory_row(settings.shape, method, *sizes, checkpointing, settings.device, settings.r)
            free()


def memory_of_large(settings: DeviceSettings) -> Rows:
    """The same of QLoRA on a large shape."""
    shape = GPTConfig.preset(settings.large, max_position_embeddings=settings.large_tokens)
    for checkpointing in (True, False):
        sizes = 1, settings.large_tokens
        yield memory_row(shape, "qlora", *sizes, checkpointing, settings.device, settings.r)
        free()


def decoding(settings: DeviceSettings) -> Rows:
    """Greedy decoding in bfloat16: the adapter apart over merged."""
    settings = replace(settings, dtype="bfloat16")
    merged, apart = settings.build_lora_model(), settings.build_lora_model()
    merge_lora(merged)
    for count in settings.decoded_rows:
        prompts = settings.random_ids(count, settings.prompt_length).tolist()

        def decoder(model: GPT, prompts=prompts) -> Callable:
            return lambda: generate(model, prompts, settings.new_tokens)

        actions = {"merged": decoder(merged), "adapter apart": decoder(apart)}
        yield from timed(actions, settings, count * settings.new_tokens, rows=count)


def bank(settings: DeviceSettings) -> Rows:
    """Rows with an adapter each over the base alone, in bfloat16; the bars of the CPU's bench do not count here."""
    short = replace(settings, dtype="bfloat16", sequence_length=settings.serving_length)
    with torch.no_grad():
        for row in serving(short):
            yield {name: value for name, value in asdict(row).items() if name not in ("bar", "arithmetic")}


SECTIONS: dict[str, Callable[[DeviceSettings], Rows]] = {
    "correctness": correctness,
    "memory": memory,
    "memory of a large model": memory_of_large,
    "steps in float32": lambda settings: steps(settings, "float32"),
    "steps under autocast": lambda settings: steps(settings, "bfloat16"),
    "decoding": decoding,
    "adapter bank": bank,
    "steps over peers in float32": lambda settings: steps_over_peers(settings, "float32"),
    "steps over peers under autocast": lambda settings: steps_over_peers(settings, "bfloat16"),
}


# The run


def free():
    """Gives back what nothing holds any more: each section begins with an empty device."""
    gc.collect()  # models of transformers hold themselves
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def machine(device: str) -> dict[str, Any]:
    """Where it runs, and with what."""
    found: dict[str, Any] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    found["name"] = platform.processor() or platform.machine()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    found |= {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"float32_products": torch.get_float32_matmul_precision()}


def run_section(section: Callable[[DeviceSettings], Rows], settings: DeviceSettings) -> dict[str, Any]:
    """Its rows and seconds; where it fails, the rows up to there and the first line of the error."""
    began, rows, found = time.perf_counter(), [], {}
    try:
        for row in section(settings):
            rows.append(row)
    except Exception as error:  # whatever it is, the other sections are wanted
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    free()
    return {"seconds": round(time.perf_counter() - began, 1), "rows": rows, **found}


def run_device(settings: DeviceSettings, out: Path | None = None) -> dict[str, Any]:
    """Runs every section, prints each as it is done, and writes the file `out` after each.

    Raises ValueError, before anything is measured, for an `out` that exists or cannot be written.
    """
    if out is not None and out.exists():
        raise ValueError(f"{out} exists; measurements are kept, so name another file, or remove that one")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        record: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine(settings.device)}
        record |= {"settings": {**asdict(settings), "decoded_rows": list(settings.decoded_rows)}, "sections": {}}
        if out is not None:
            write_json(out, record)
        for name, section in SECTIONS.items():
            record["sections"][name] = run_section(section, settings)
            print(section_text(name, record["sections"][name]), flush=True)
            if out is not None:
                write_json(out, record)
    finally:
        torch.set_float32_matmul_precision(before)
    return record


def report(device: str, small: bool, out: Path | None = None, **chosen: Any) -> int:
    """The whole run; returns the exit status, 1 where a section failed or a fast path is wrong."""
    make = small_settings if small else DeviceSettings
    return int(failed(run_device(make(device=device, **chosen), out)))
