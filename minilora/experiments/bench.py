"""The speed ratios we claim, measured on the reader's own machine, each beside its bar and its arithmetic.

A number of seconds says more about the machine than about the method, and drifts with whatever else runs. So
everything here is a ratio of two things timed in turn, A B A B, in one process, and what is reported is the median of
the ratios over the rounds. Load and thread count at the time are printed with it.

The model of the claims is small enough for two cores and large enough for matrix products to dominate: 8 layers, 512
wide, 8 heads, 1408 inside the MLP, a vocabulary of 2048 (a large one would measure the softmax), 26.7 million
parameters. A step is the training loop's own (`train.training_step`): forward, cross entropy, backward, clipping,
fused AdamW on what is trainable, float32.

`arithmetic` is the ratio of floating-point operations in matrix products, counted while the step runs. A training
step has three products for each weight: output, input gradient, weight gradient. LoRA skips the third, which gives 2/3.
It counts LoRA's thin products too (above 2/3), and what a frozen embedding spares: nothing below the first adapter
needs a gradient (below 2/3). Attention's own products are left out; they are the same for both.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from minilora.adapters.inject import adapter_parameters, apply_lora, extract_adapter, merge_lora
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate
from minilora.lora import LoRAConfig
from minilora.model import GPT, GPTConfig, KVCache
from minilora.quant import dequantize, quantize, quantize_model
from minilora.train import TrainConfig, make_optimizer, training_step


@dataclass
class BenchSettings:
    """What is timed. The defaults are the shape our claims are made for; a bar means nothing at another shape."""

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    vocab_size: int = 2048
    batch_size: int = 8
    sequence_length: int = 256
    r: int = 8
    matrix_size: int = 4096  # of the square weight that is quantized
    serving_rows: int = 16  # of a batch in which each row has an adapter of its own
    rounds: int = 5
    threads: int = 2
    seed: int = 0
    progress: bool = True

    def build_model(self) -> GPT:
        """A plain model of this shape, with the same weights at every call."""
        torch.manual_seed(self.seed)
        return GPT(
            GPTConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                max_position_embeddings=self.sequence_length,
            )
        )

    def build_lora_model(self, target_modules: list[str] | str) -> GPT:
        return apply_lora(self.build_model(), LoRAConfig(self.r, 2 * self.r, target_modules=target_modules))

    def build_qlora_model(self) -> GPT:
        return apply_lora(
            quantize_model(self.build_model()), LoRAConfig(self.r, 2 * self.r, target_modules="all-linear")
        )

    def random_ids(self) -> torch.Tensor:
        """(batch_size, sequence_length) int64."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.vocab_size, (self.batch_size, self.sequence_length), generator=generator)


@dataclass
class BenchRow:
    """One claim: `ratio` is to be at most `bar`; without a bar it is a measurement and nothing is claimed."""

    claim: str
    ratio: float  # median over the rounds
    lowest: float
    highest: float
    bar: float | None
    arithmetic: float | None  # ratio of the matrix products' floating-point operations, where there are any


def interleave(actions: dict[str, Callable], settings: BenchSettings, description: str) -> tuple[dict, dict]:
    """Runs the actions in turn; the first is what the others are held against.

    Returns, for each of the others, the ratio of its time to the first's in each round, and the ratio of its
    floating-point operations. These are counted in a first run of each, which also warms up and is not timed.
    """
    operations, seconds = {}, {name: [] for name in actions}
    with tqdm(total=len(actions) * (1 + settings.rounds), desc=description, disable=not settings.progress) as bar:
        for name, action in actions.items():
            with FlopCounterMode(display=False) as counter:
                action()
            operations[name] = counter.get_total_flops()
            bar.update()
        for _ in range(settings.rounds):
            for name, action in actions.items():
                began = time.perf_counter()
                action()
                seconds[name].append(time.perf_counter() - began)
                bar.update()
    first, *others = actions
    ratios = {name: [b / a for a, b in zip(seconds[first], seconds[name], strict=True)] for name in others}
    return ratios, {name: operations[name] / operations[first] if operations[first] else None for name in others}


def make_rows(ratios: dict, arithmetic: dict, bars: dict) -> list[BenchRow]:
    return [
        BenchRow(claim, statistics.median(values), min(values), max(values), bars.get(claim), arithmetic.get(claim))
        for claim, values in ratios.items()
    ]


def step_of(model: nn.Module, settings: BenchSettings) -> Callable:
    """One training step on the same random batch, again at every call."""
    config = TrainConfig(steps=1, batch_size=settings.batch_size, learning_rate=1e-4, precision="float32")
    optimizer, ids = make_optimizer(model, config), settings.random_ids()
    return lambda: training_step(model, optimizer, ids, ids, config)


def training_steps(settings: BenchSettings) -> list[BenchRow]:
    """A training step of LoRA and of QLoRA against full fine-tuning's."""
    few, every = f"step, LoRA r={settings.r} on q_proj, v_proj", f"step, LoRA r={settings.r} on all linears"
    models = {
        "step, full fine-tuning": settings.build_model(),
        few: settings.build_lora_model(["q_proj", "v_proj"]),
        every: settings.build_lora_model("all-linear"),
        f"step, QLoRA r={settings.r} on all linears": settings.build_qlora_model(),
    }
    actions = {name: step_of(model, settings) for name, model in models.items()}
    return make_rows(*interleave(actions, settings, "training steps"), {few: 0.72, every: 0.80})


def dora_step(settings: BenchSettings) -> list[BenchRow]:
    """A training step of DoRA against plain LoRA's."""
    claim = f"step, DoRA r={settings.r} over LoRA's"
    config = LoRAConfig(settings.r, 2 * settings.r, target_modules="all-linear", use_dora=True)
    models = {"LoRA": settings.build_lora_model("all-linear"), claim: apply_lora(settings.build_model(), config)}
    actions = {name: step_of(model, settings) for name, model in models.items()}
    return make_rows(*interleave(actions, settings, "DoRA"), {claim: 1.10})


def merged_forward(settings: BenchSettings) -> list[BenchRow]:
    """A merged model's forward pass against the base model's: the same arithmetic, so the bar is 1 and some noise."""
    base, merged = settings.build_model(), settings.build_lora_model("all-linear")
    for parameter in adapter_parameters(merged):
        nn.init.normal_(parameter, std=0.02)
    merge_lora(merged)
    ids = settings.random_ids()
    claim = "forward, LoRA merged"
    with torch.no_grad():
        measured = interleave({"forward, base": lambda: base(ids), claim: lambda: merged(ids)}, settings, "forward")
    return make_rows(*measured, {claim: 1.05})


def quantization(settings: BenchSettings) -> list[BenchRow]:
    """To NF4 and back against a float32 copy of the same weight, and against bitsandbytes where it is installed.

    Dequantizing waits for memory, and the result is all new memory, which the system hands out slowly. In a process
    that has freed as much before it comes quickly: a copy then takes a fifth of the time, and a fused kernel, which
    writes each number once, gains more by that than we do. Here it runs in a fresh process.
    """
    torch.manual_seed(settings.seed)
    weight = torch.randn(settings.matrix_size, settings.matrix_size)
    stored = quantize(weight, "nf4")
    to_codes, back = (lambda: quantize(weight, "nf4")), (lambda: dequantize(stored))
    actions = {"copy": weight.clone, "quantize, over a copy": to_codes, "dequantize, over a copy": back}
    rows = make_rows(*interleave(actions, settings, "quantization"), {})
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        return rows
    codes, state = quantize_4bit(weight, quant_type="nf4")
    for claim, bar, ours, theirs in (
        ("quantize, over bitsandbytes", 1.0, to_codes, lambda: quantize_4bit(weight, quant_type="nf4")),
        ("dequantize, over bitsandbytes", 2.5, back, lambda: dequantize_4bit(codes, state)),
    ):
        rows += make_rows(*interleave({"theirs": theirs, claim: ours}, settings, claim), {claim: bar})
    return rows


def serving(settings: BenchSettings) -> list[BenchRow]:
    """A batch in which each row has its own adapter, against the base alone; and many resident adapters against few."""

    def bank_of(count: int) -> AdapterBank:
        adapted = settings.build_lora_model("all-linear")
        for parameter in adapter_parameters(adapted):
            nn.init.normal_(parameter, std=0.02)
        adapter = extract_adapter(adapted)  # the numbers do not matter: one adapter under many names
        names = [f"adapter {number}" for number in range(count)]
        bank = AdapterBank(settings.build_model(), dict.fromkeys(names, adapter), slots=count)
        bank.forward(torch.zeros(count, 1, dtype=torch.int64), names)  # all of them into their slots
        return bank

    rows, generator = settings.serving_rows, torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(settings.vocab_size, (rows, settings.sequence_length // 4), generator=generator)
    prompts = ids[:, : ids.shape[1] // 4].tolist()
    base, few, many = settings.build_model().eval(), bank_of(rows), bank_of(16 * rows)
    names = few.names

    def decode(model: nn.Module, cache: KVCache):
        """One more token; the cache is put back."""
        before = dict(cache.layers)
        model(ids[:, :1], cache)
        cache.layers = before

    base_cache, bank_cache = KVCache(), KVCache()
    what = f"{rows} rows, {rows} adapters"
    forward, one, text = f"forward, {what}", f"one token, {what}", f"generation, {what}"
    resident = f"forward, {16 * rows} resident over {rows}"
    with torch.no_grad():
        measured = interleave({"base": lambda: base(ids), forward: lambda: few(ids, names)}, settings, forward)
        result = make_rows(measured[0], {}, {forward: 1.25})
        base(ids, base_cache)
        with few.rows(names) as model:
            model(ids, bank_cache)
            actions = {"base": lambda: decode(base, base_cache), one: lambda: decode(model, bank_cache)}
            result += make_rows(interleave(actions, settings, one)[0], {}, {one: 1.8})
        length = settings.sequence_length // 16
        actions = {"base": lambda: generate(base, prompts, length), text: lambda: few.generate(prompts, names, length)}
        result += make_rows(interleave(actions, settings, text)[0], {}, {text: 1.6})
        actions = {"few": lambda: few(ids, names), resident: lambda: many(ids, names)}
        result += make_rows(interleave(actions, settings, resident)[0], {}, {resident: 1.1})
    return result


# One function for each kind of claim: settings in, rows out. Quantization first: see its docstring.
CLAIMS = (quantization, training_steps, dora_step, merged_forward, serving)


def run_bench(settings: BenchSettings | None = None) -> list[BenchRow]:
    """Measures every claim: about two minutes on two idle cores with the default settings."""
    settings = settings or BenchSettings()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return [row for claim in CLAIMS for row in claim(settings)]
    finally:
        torch.set_num_threads(threads)


def format_bench(rows: list[BenchRow], settings: BenchSettings | None = None) -> str:
    """The rows as a table, over it the conditions of the measurement. Call it at once: it reads the load."""
    settings = settings or BenchSettings()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"  # Windows has none
    lines = [
        f"torch {torch.__version__}, {settings.threads} threads, load over the last minute {load}, about "
        f"{settings.threads} of it our own (much more: something else was running, do not trust the ratios)",
        f"{settings.num_hidden_layers} layers, {settings.hidden_size} wide, batch {settings.batch_size} x "
        f"{settings.sequence_length}, float32; ratios to the full step, the base's forward or what is named; nf4 of a "
        f"{settings.matrix_size} x {settings.matrix_size} weight; median of {settings.rounds} rounds",
        "",
        f"{'':36}{'ratio':>7}{'lowest':>9}{'highest':>9}{'bar':>7}  {'':6}{'arithmetic':>12}",
    ]
    for row in rows:
        verdict = "" if row.bar is None else "met" if row.ratio <= row.bar else "MISSED"
        bar = "-" if row.bar is None else f"{row.bar:.2f}"
        arithmetic = "-" if row.arithmetic is None else f"{row.arithmetic:.3f}"
        lines.append(
            f"{row.claim:36}{row.ratio:7.2f}{row.lowest:9.2f}{row.highest:9.2f}{bar:>7}  {verdict:6}{arithmetic:>12}"
        )
    lines.append("\nLimit of a LoRA step: 2/3 of the full step's products of weights (arithmetic 0.667).")
    return "\n".join(lines)
