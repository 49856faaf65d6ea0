"""A real model measured: time beside other libraries', memory beside the process's own, 4 bits beside floats.

The ratios are in `bench_ratios`, taken as `bench` takes its own. Beside them stand two measurements without a bar:

- memory: the bytes of tensors that `MemoryMeter` counts in a LoRA step, beside the growth of the process's resident set
  during it, in a fresh process, because a used one holds memory that it has freed and takes it again unseen. The C
  library's allocator does so within the step too, and what it holds counts as resident; so it is measured a second time
  with an allocator that gives every freed block back at once, which leaves the tensors and little else;
- 4 bits: how long the model takes to load, and its loss on English text. A model from a 4-bit file is rounded for the
  second time, by levels that are not the file's own.
"""

import contextlib
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from minilora.experiments.bench_ratios import CLAIMS, ModelBenchSettings
from minilora.experiments.bench_rows import BenchRow, format_rows
from minilora.experiments.compare import bits_per_weight
from minilora.experiments.timing import in_a_fresh_process, thread_count
from minilora.memory import Bytes, MemoryMeter, format_bytes
from minilora.quant import Quantization
from minilora.storage.models import load_model
from minilora.text.batches import Batches, cut
from minilora.text.english import python_documentation
from minilora.text.tokenizer import AnyTokenizer, open_tokenizer
from minilora.train import evaluate_loss, make_optimizer, training_step
from minilora.train_settings import TrainConfig

FORMATS = {"float32": None, **{scheme: Quantization(scheme) for scheme in ("nf4", "int4", "fp4")}}
RETURN_BLOCKS = "MALLOC_MMAP_THRESHOLD_"  # glibc: blocks from so many bytes on are the system's again when freed


@dataclass
class StepMemory:
    """What a LoRA step on all linears takes."""

    peak: Bytes  # of tensors
    growth: int | None  # of the resident set; None where the system does not tell
    growth_returned: int | None  # the same where every freed block goes back to the system at once


def resident_set() -> tuple[int, int] | None:
    """Bytes of this process that are in memory, now and at most so far; None where the system is not Linux."""
    status = Path("/proc/self/status")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
    if "VmHWM" not in fields:
        return None
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def forget_highest():
    """Lets the highest resident set begin at the present one: loading the model may have needed more than a step."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_of_step(settings: ModelBenchSettings) -> tuple[Bytes, int | None]:
    """The peak of a step, and how far the resident set grows in two, of which the first makes the optimizer's state.

    To be called in a process of its own.
    """
    with thread_count(settings.threads):
        model = settings.load_lora()
        config, batch = TrainConfig(1, settings.batch_size, 1e-4, precision="float32"), settings.batch()
        forget_highest()
        optimizer, before = make_optimizer(model, config), resident_set()
        for _ in tqdm(range(2), "memory of a step", disable=not settings.progress):
            training_step(model, optimizer, *batch, config)
        after = resident_set()
        with MemoryMeter(model, optimizer) as meter:
            training_step(model, optimizer, *batch, config)
    return meter.peak, after[1] - before[0] if before and after else None


def measure_memory(settings: ModelBenchSettings) -> StepMemory:
    """Two processes: an allocator as it is, and glibc's told to keep no freed block of 64 KiB or more."""
    peak, growth = in_a_fresh_process(memory_of_step, settings)
    return StepMemory(peak, growth, in_a_fresh_process(memory_of_step, settings, **{RETURN_BLOCKS: str(2**16)})[1])


@dataclass
class FormatRow:
    """The model with its block linears in one format."""

    name: str
    bits: float  # per weight of a block linear
    seconds: float  # to load it
    loss: float  # nats per token of English text


def english_rows(tokenizer: AnyTokenizer, settings: ModelBenchSettings) -> Batches:
    """Documentation of the standard library, (text_rows, text_length), the same at every call with one Python."""
    documents, wanted = python_documentation(), settings.text_rows * settings.text_length
    Random(settings.seed).shuffle(documents)
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document + "\n\n")
        if len(ids) >= wanted:
            break
    return cut(ids[:wanted], settings.text_length)


def measure_formats(settings: ModelBenchSettings) -> list[FormatRow]:
    """Float32 as it came, and each way to round it."""
    data, rows = english_rows(open_tokenizer(settings.base), settings), []
    for name, quantization in tqdm(FORMATS.items(), "loss in 4 bits", disable=not settings.progress):
        began = time.perf_counter()
        model = load_model(settings.base, torch.float32, quantization=quantization)
        seconds = time.perf_counter() - began
        loss = evaluate_loss(model, data, settings.batch_size, "float32")
        rows.append(FormatRow(name, bits_per_weight(model), seconds, loss))
    return rows


@dataclass
class ModelBench:
    rows: list[BenchRow]
    memory: StepMemory
    formats: list[FormatRow]


def run_model_bench(settings: ModelBenchSettings) -> ModelBench:
    """Measures everything: about eight minutes on two idle cores, the peers among it. ValueError as `check`."""
    settings.check()
    memory, rows = measure_memory(settings), []
    with thread_count(settings.threads):
        formats = measure_formats(settings)
        for claim in CLAIMS:
            rows += claim(settings)
            gc.collect()  # the peers' models hold themselves
    return ModelBench(rows, memory, formats)


def format_model_bench(bench: ModelBench, settings: ModelBenchSettings) -> str:
    """The ratios as `bench` without a base prints them, the memory of a step, and the losses.

    Call it right after the measurement: it prints the load as it is then.
    """
    shape = (
        f"{settings.base.name} on the CPU in float32, batch {settings.batch_size} x {settings.sequence_length} "
        f"of which {settings.counted_tokens} count, LoRA r={settings.r} on all linears; decoding N rows of "
        f"{settings.prompt_length} tokens by {settings.new_tokens}; median of {settings.rounds} rounds"
    )
    peak, memory = bench.memory.peak, bench.memory
    grown = [
        "unknown on this system" if growth is None else format_bytes(growth)
        for growth in (memory.growth, memory.growth_returned)
    ]
    first = bench.formats[0].loss
    lines = [
        format_rows(bench.rows, settings, shape),
        "\nmemory of a LoRA step",
        f"{'bytes of tensors at the peak':36}{format_bytes(peak.total):>12}",
        f"{'  beyond the weights':36}{format_bytes(peak.total - peak.weights):>12}",
        f"{'growth of the resident set':36}{grown[0]:>12}",
        f"{'  if freed blocks go back at once':36}{grown[1]:>12}",
        f"\n{settings.text_rows} x {settings.text_length} tokens of Python's documentation; a model that came from a "
        "4-bit file is rounded a second time",
        f"{'block linears in':20}{'bits per weight':>16}{'load, s':>10}{'nats/token':>12}{'cost':>9}",
    ]
    for row in bench.formats:
        cost = f"{row.loss - first:+.4f}"
        lines.append(f"{row.name:20}{row.bits:16.2f}{row.seconds:10.2f}{row.loss:12.4f}{cost:>9}")
    return "\n".join(lines)


def report(base: Path, **chosen: Any) -> str:
    """The whole bench of this base. chosen: fields of ModelBenchSettings."""
    settings = ModelBenchSettings(base=base, **chosen)
    return format_model_bench(run_model_bench(settings), settings)
