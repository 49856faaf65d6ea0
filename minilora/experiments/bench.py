"""The speed ratios we claim, measured on the reader's own machine, each beside its bar and its arithmetic.

A number of seconds says more about the machine than about the method, and drifts with whatever else runs. So
everything here is a ratio of two things timed in turn, A B A B, in one process, and the median of the ratios over the
rounds is reported, with the load and the thread count at the time.

The model of the claims is small enough for two cores and large enough for matrix products to dominate: 26.7 million
parameters, with a vocabulary of only 2048 (a large one would measure the softmax). A step is the training loop's own
(`train.training_step`): forward, cross entropy, backward, clipping, fused AdamW on what is trainable, float32.

`arithmetic` is the ratio of floating-point operations in matrix products, counted while the step runs. A training
step has three products for each weight: output, input gradient, weight gradient. LoRA skips the third, which gives 2/3.
LoRA's thin products count too (above 2/3), and so do the gradients that a frozen embedding spares: nothing below the
first adapter needs one (below 2/3). Attention's own products are left out, because they are the same for both.
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import extract_adapter
from minilora.adapters.inject import adapter_parameters, apply_lora, merge_lora
from minilora.config import LoRAConfig
from minilora.dtypes import DTYPES
from minilora.experiments import peers
from minilora.experiments.bench_rows import BenchRow, format_rows, measure
from minilora.experiments.simulate import build
from minilora.experiments.timing import Actions, Timing, in_a_fresh_process, thread_count
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate
from minilora.inference.prepared import Prepared
from minilora.linear4bit import quantize_model
from minilora.model import GPT, GPTConfig, KVCache
from minilora.places import DATA
from minilora.quant import dequantize, quantize
from minilora.storage.models import load_model
from minilora.train import make_optimizer, training_step
from minilora.train_settings import TrainConfig

# glibc: blocks of any size come from memory that stays with the process when it is freed.
KEEP_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass
class BenchSettings(Timing):
    """The shapes that are timed. Our claims are made for the defaults; a bar means nothing at another shape."""

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
    num_key_value_heads: int = 0  # as in GPTConfig
    device: str = "cpu"
    dtype: str = "float32"  # of the weights

    @property
    def shape(self) -> GPTConfig:
        sizes = self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers
        heads = self.num_attention_heads, self.num_key_value_heads
        return GPTConfig(*sizes, *heads, max_position_embeddings=self.sequence_length)

    def build_model(self) -> GPT:
        """A plain model of this shape, with the same weights at every call."""
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            return build(self.shape, DTYPES[self.dtype])

    def build_lora_model(
        self, targets: list[str] | str = "all-linear", in_4_bits=False, use_dora=False, dropout=0.0
    ) -> GPT:
        """The same with random A and B: as far as time is concerned, a trained adapter."""
        model = self.build_model()
        if in_4_bits:
            quantize_model(model)
        apply_lora(model, LoRAConfig(self.r, 2 * self.r, dropout, targets, use_dora=use_dora))
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter, std=0.02)
        return model

    def random_ids(self, *shape: int) -> Tensor:
        """int64, the same at every call and on every device."""
        drawn = torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(self.seed))
        return drawn.to(self.device)


def step_of(model: nn.Module, input_ids: Tensor, labels: Tensor, precision="float32") -> Callable[[], Tensor]:
    """A function that takes one training step, always on the same batch, (B, T) both."""
    config = TrainConfig(steps=1, batch_size=len(input_ids), learning_rate=1e-4, precision=precision)
    optimizer = make_optimizer(model, config)
    return lambda: training_step(model, optimizer, input_ids, labels, config)


def measure_steps(models: dict[str, GPT], settings: BenchSettings, bars: dict[str, float]) -> list[BenchRow]:
    """A training step of each model, always on the same random batch."""
    ids = settings.random_ids(settings.batch_size, settings.sequence_length)
    return measure({name: step_of(model, ids, ids) for name, model in models.items()}, settings, bars)


def training_steps(settings: BenchSettings) -> list[BenchRow]:
    """A training step of LoRA and of QLoRA against full fine-tuning's."""
    r, layers = settings.r, settings.num_hidden_layers
    few, every = f"step, LoRA r={r} on q_proj, v_proj", f"step, LoRA r={r} on all linears"
    dropped, late, quantized = f"{every}, dropout 0.05", f"{every}, last third", every.replace("LoRA", "QLoRA")
    last = "|".join(str(number) for number in range(layers - max(1, layers // 3), layers))
    models = {"step, full fine-tuning": settings.build_model()}
    models |= {few: settings.build_lora_model(["q_proj", "v_proj"]), every: settings.build_lora_model()}
    models |= {dropped: settings.build_lora_model(dropout=0.05)}
    models |= {late: settings.build_lora_model(rf".*\.({last})\.(self_attn|mlp)\..*_proj")}
    models |= {quantized: settings.build_lora_model(in_4_bits=True)}
    return measure_steps(models, settings, {few: 0.72, every: 0.74, dropped: 0.90, quantized: 0.85})


@peers.quiet()
def steps_of_peers(settings: BenchSettings) -> list[BenchRow]:
    """PEFT's step against transformers' full one, for the rows above; no rows where these are not installed."""
    if not peers.installed():
        return []
    kinds: dict[str, dict] = {
        "step, PEFT's LoRA on q_proj, v_proj": {"target_modules": ["q_proj", "v_proj"]},
        "step, PEFT's LoRA on all linears": {},
        "step, PEFT's LoRA on all linears, dropout 0.05": {"lora_dropout": 0.05},
        "step, PEFT's DoRA on all linears": {"use_dora": True},
    }
    ids = settings.random_ids(settings.batch_size, settings.sequence_length)
    models = {"transformers' full step": peers.make(settings.shape, settings.device)}
    models |= {name: peers.make(settings.shape, settings.device, settings.r, **lora) for name, lora in kinds.items()}
    rows = measure({name: peers.training_step_of(model, ids, ids) for name, model in models.items()}, settings, {})
    del models
    gc.collect()  # their models hold themselves
    return rows


def dora_step(settings: BenchSettings) -> list[BenchRow]:
    """A training step of DoRA against plain LoRA's."""
    claim = f"step, DoRA r={settings.r} over LoRA's"
    models = {"LoRA": settings.build_lora_model(), claim: settings.build_lora_model(use_dora=True)}
    return measure_steps(models, settings, {claim: 1.10})


def merged_forward(settings: BenchSettings) -> list[BenchRow]:
    """A merged model's forward pass against the base model's: the same arithmetic, so the bar is 1 and some noise."""
    base, merged, claim = settings.build_model(), settings.build_lora_model(), "forward, LoRA merged"
    merge_lora(merged)
    ids = settings.random_ids(settings.batch_size, settings.sequence_length)
    with torch.no_grad():
        return measure({"forward, base": lambda: base(ids), claim: lambda: merged(ids)}, settings, {claim: 1.05})


def quantization(settings: BenchSettings) -> list[BenchRow]:
    """To NF4 and back against a float32 copy of the same weight, and against bitsandbytes where it is installed.

    Dequantizing waits for memory: the result is all new memory, which the system hands out slowly. A process that has
    freed as much memory before gets it quickly. A copy then takes a fifth of the time, and a fused kernel, which writes
    each number once, gains more than our several operations do. So this claim is measured first, in a fresh process,
    and once more in one whose allocator keeps what is freed.
    """
    rows = in_a_fresh_process(quantization_of, settings)
    for row in in_a_fresh_process(quantization_of, settings, **KEEP_BLOCKS):
        if row.claim.startswith("dequantize"):
            rows.append(replace(row, claim=f"{row.claim}, memory used again", bar=row.bar and 4.0))
    return rows


def quantization_of(settings: BenchSettings) -> list[BenchRow]:
    with thread_count(settings.threads):
        torch.manual_seed(settings.seed)
        weight = torch.randn(settings.matrix_size, settings.matrix_size)
        quantized = quantize(weight, "nf4")
        to_codes, back = "quantize, over a copy", "dequantize, over a copy"
        ours = {to_codes: lambda: quantize(weight, "nf4"), back: lambda: dequantize(quantized)}
        rows = measure({"copy": weight.clone, **ours}, settings, {}, counted=False)
        try:
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        except ImportError:
            return rows
        codes, state = quantize_4bit(weight, quant_type="nf4")
        theirs = {
            to_codes: lambda: quantize_4bit(weight, quant_type="nf4"),
            back: lambda: dequantize_4bit(codes, state),
        }
        for name, bar in ((to_codes, 1.0), (back, 2.5)):
            claim = name.replace("a copy", "bitsandbytes")
            rows += measure({"theirs": theirs[name], claim: ours[name]}, settings, {claim: bar}, counted=False)
        return rows


def one_token(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """A function that computes one token more for each row of ids (B, T), always the same one, as `generate` does. Call
    it without gradients."""
    cache, prepared = KVCache(), Prepared(model)
    model(ids, cache)
    before = dict(cache.layers)

    def decode():
        with prepared:
            model(ids[:, :1], cache)
        cache.layers = dict(before)

    return decode


def decoding(settings: BenchSettings) -> list[BenchRow]:
    """A text of 64 tokens, one row, from the base that ships: the adapter apart against merged."""
    apart = load_model(DATA / "base", DTYPES[settings.dtype])
    apply_lora(apart, LoRAConfig(settings.r, 2 * settings.r, target_modules="all-linear"))
    merged, claim = copy.deepcopy(apart), "generation, one row, shipped base, adapter apart over merged"
    merge_lora(merged)
    actions: Actions = {"merged": partial(generate, merged, [[1, 2, 3]], 64)}
    actions[claim] = partial(generate, apart, [[1, 2, 3]], 64)
    return measure(actions, settings, {claim: 1.25}, counted=False)


def serving(settings: BenchSettings) -> list[BenchRow]:
    """A batch in which each row has its own adapter, against the base alone; many resident adapters, against few."""

    def bank_of(count: int) -> AdapterBank:
        adapter = extract_adapter(settings.build_lora_model())
        names = [f"adapter {number}" for number in range(count)]  # of one adapter: its numbers do not matter
        bank = AdapterBank(settings.build_model(), dict.fromkeys(names, adapter), slots=count)
        bank.forward(
            torch.zeros(count, 1, dtype=torch.int64, device=settings.device), names
        )  # all of them into their slots
        return bank

    rows = settings.serving_rows
    ids = settings.random_ids(rows, settings.sequence_length // 4)
    prompts, length = ids[:, : ids.shape[1] // 4].tolist(), settings.sequence_length // 16
    base, few, many = settings.build_model().eval(), bank_of(rows), bank_of(16 * rows)
    names, each = few.names, f"{rows} rows, {rows} adapters"

    def row(claim: str, first: Callable, second: Callable, bar: float) -> list[BenchRow]:
        return measure({"first": first, claim: second}, settings, {claim: bar}, counted=False)

    with torch.no_grad():
        result = row(f"forward, {each}", lambda: base(ids), lambda: few(ids, names), 1.25)
        with few.rows(names) as model:
            result += row(f"one token, {each}", one_token(base, ids), one_token(model, ids), 1.8)
        texts = lambda: generate(base, prompts, length), lambda: few.generate(prompts, names, length)
        result += row(f"generation, {each}", *texts, 1.6)
        resident = f"forward, {16 * rows} resident over {rows}"
        return result + row(resident, lambda: few(ids, names), lambda: many(ids, names), 1.1)


# Settings in, rows out.
CLAIMS = (quantization, training_steps, dora_step, steps_of_peers, merged_forward, decoding, serving)


def run_bench(settings: BenchSettings) -> list[BenchRow]:
    """Measures every claim: about three minutes on two idle cores with the default settings, the peers among it."""
    with thread_count(settings.threads):
        return [row for claim in CLAIMS for row in claim(settings)]


def format_bench(rows: list[BenchRow], settings: BenchSettings) -> str:
    """The rows as a table; call it at once, as `format_rows`."""
    shape = (
        f"{settings.num_hidden_layers} layers, {settings.hidden_size} wide, batch {settings.batch_size} x "
        f"{settings.sequence_length}, float32; ratios to the full step, the base's forward or what is named; nf4 of a "
        f"{settings.matrix_size} x {settings.matrix_size} weight; median of {settings.rounds} rounds"
    )
    return format_rows(rows, settings, shape)


def report(**chosen: Any) -> str:
    """The whole bench as a table. chosen: fields of BenchSettings."""
    settings = BenchSettings(**chosen)
    return format_bench(run_bench(settings), settings)
