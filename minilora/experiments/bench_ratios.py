"""Steps and decoding of a real model, timed in turn: ours among themselves, and over PEFT's and transformers'.

A step is of instruction data: 8 rows of 96 tokens, of which the last 24 count. With SmolLM2's vocabulary of 49,152 the
logits of all 96 cost more than many a layer, and the loop makes those that count. The peers make all of them. Greedy
decoding continues a prompt of 32 tokens by exactly 32, on every side.

A bank's batch costs more than the base's, since each row reads an A and a B of its own. On SmolLM2, r = 8, sixteen rows
read 156 MB of these beside 538 MB of weights, 29 % more, and compute 2 % more. Where a token waits for memory alone the
ratio can be no less than 1.29, and where it waits for arithmetic alone, 1.02.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.adapter import extract_adapter
from minilora.adapters.inject import apply_lora, merge_lora
from minilora.config import LoRAConfig
from minilora.experiments import peers
from minilora.experiments.bench import one_token, step_of
from minilora.experiments.bench_rows import BenchRow, measure
from minilora.experiments.timing import Timing
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate
from minilora.model import GPT
from minilora.rows import batch_of
from minilora.storage.config import load_config
from minilora.storage.get import MODELS
from minilora.storage.models import load_model, open_checkpoint
from minilora.storage.quantized import quantized_parts
from minilora.text.batches import Batches
from minilora.train import next_token_targets
from minilora.train_settings import IGNORE, TrainConfig


@dataclass
class ModelBenchSettings(Timing):
    """What is timed. Our claims are made for SmolLM2-135M and the defaults; a bar means nothing elsewhere."""

    rounds: int = 3
    base: Path = MODELS / "smollm2"
    batch_size: int = 8
    sequence_length: int = 96
    counted_tokens: int = 24  # the last of each row
    r: int = 8
    prompt_length: int = 32
    new_tokens: int = 32
    decoded_rows: tuple[int, ...] = (1, 16)
    served_rows: int = 16  # of a batch in which each row has an adapter of its own
    resident: int = 64  # adapters in the bank that serves it
    text_rows: int = 16
    text_length: int = 256

    def load(self, dtype=torch.float32) -> GPT:
        return load_model(self.base, dtype)

    def load_lora(self, targets: list[str] | str = "all-linear", dtype=torch.float32) -> GPT:
        """The base with adapters, which are in float32 whatever the base is in."""
        model = self.load(dtype)
        apply_lora(model, LoRAConfig(self.r, 2 * self.r, target_modules=targets))
        return model

    def random_ids(self, *shape: int) -> Tensor:
        """int64, the same at every call."""
        vocabulary = load_config(self.base).vocab_size
        return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(self.seed))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Input ids and labels of a training step, (B, T) both."""
        ids = self.random_ids(self.batch_size, self.sequence_length)
        labels = ids.clone()
        labels[:, : -self.counted_tokens] = IGNORE
        return ids, labels

    def unlike_rows(self) -> Batches:
        """Six batches of rows that have from half the length to all of it; the last quarter of each counts."""
        lengths = torch.linspace(self.sequence_length // 2, self.sequence_length, 6 * self.batch_size).long()
        ids, places = self.random_ids(len(lengths), self.sequence_length), torch.arange(self.sequence_length)
        counts = (places < lengths[:, None]) & (places >= lengths[:, None] * 3 // 4)
        return Batches(ids, ids.masked_fill(~counts, IGNORE))

    def check(self):
        """Raises ValueError for a base that is too short for what is timed, or in 4 bits."""
        limit = load_config(self.base).max_position_embeddings
        longest = max(self.sequence_length, self.text_length, self.prompt_length + self.new_tokens)
        if longest > limit:
            raise ValueError(f"sequences of {longest} tokens are timed, and those of {self.base} end at {limit}")
        if quantized_parts(list(open_checkpoint(self.base).shapes)):
            raise ValueError(f"{self.base} is in 4 bits, and full fine-tuning, which is timed too, needs floats")


class LossOfAllLogits(nn.Module):
    """Makes the logits and the cross entropy of every place, those that do not count among them, as the peers do."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits, targets = self.model(input_ids), next_token_targets(labels)  # (B, T, V), (B, T)
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))


def training_steps(settings: ModelBenchSettings) -> list[BenchRow]:
    """LoRA's step over full fine-tuning's; what it saves to make only the logits that count."""
    batch, every = settings.batch(), settings.load_lora()
    models = {"full": settings.load(), "step, LoRA q_proj, v_proj over full": settings.load_lora(["q_proj", "v_proj"])}
    models["step, LoRA all linears over full"] = every
    rows = measure({name: step_of(model, *batch) for name, model in models.items()}, settings, {})
    del models
    actions = {
        "selected": step_of(every, *batch),
        "step, logits of all tokens over counted": peers.training_step_of(LossOfAllLogits(every), *batch),
    }
    return rows + measure(actions, settings, {})


def precisions(settings: ModelBenchSettings) -> list[BenchRow]:
    """A LoRA step with products in bfloat16, of weights that are kept so or cast at every use, over float32's."""
    batch, model = settings.batch(), settings.load_lora()
    actions = {"float32": step_of(model, *batch)}
    actions["step, bfloat16 base over float32"] = step_of(settings.load_lora(dtype=torch.bfloat16), *batch)
    actions["step, autocast over float32"] = step_of(model, *batch, precision="bfloat16")
    return measure(actions, settings, {}, counted=False)


def decoding(settings: ModelBenchSettings) -> list[BenchRow]:
    """Greedy decoding: the adapter apart, and a base in bfloat16, over the merged model."""
    merged, apart, half = settings.load_lora(), settings.load_lora(), settings.load(torch.bfloat16)
    merge_lora(merged)
    rows = []
    for count in settings.decoded_rows:
        claim = f"decoding {count}, adapter apart over merged"
        models = {"merged": merged, claim: apart, f"decoding {count}, bfloat16 over float32": half}
        actions = {name: decoder(model, count, settings) for name, model in models.items()}
        rows += measure(actions, settings, {claim: 1.12}, counted=False)
    return rows


def decoder(model: GPT, rows: int, settings: ModelBenchSettings) -> Callable[[], list[list[int]]]:
    """A function that continues so many prompts."""
    prompts = settings.random_ids(rows, settings.prompt_length).tolist()
    return lambda: generate(model, prompts, settings.new_tokens)


def serving(settings: ModelBenchSettings) -> list[BenchRow]:
    """A bank whose rows have an adapter each, over the base alone: one token, and a text from its prompt to its end."""
    base, names = settings.load().eval(), [f"adapter {number}" for number in range(settings.resident)]
    adapter = extract_adapter(settings.load_lora())  # one for all: its numbers do not matter
    bank, rows = AdapterBank(settings.load(), dict.fromkeys(names, adapter), settings.resident), settings.served_rows
    for first in range(0, settings.resident, rows):  # all of them into their slots
        bank.forward(torch.zeros(len(names[first : first + rows]), 1, dtype=torch.int64), names[first : first + rows])
    ids, each = settings.random_ids(rows, settings.prompt_length), names[:: settings.resident // rows][:rows]
    prompts, claim = ids.tolist(), f"{rows} rows, {rows} of {settings.resident} adapters, over base"

    def row(claim: str, first: Callable, second: Callable) -> list[BenchRow]:
        return measure({"base": first, claim: second}, settings, {claim: 1.15}, counted=False)

    with torch.no_grad(), bank.rows(each) as model:
        result = row(f"one token, {claim}", one_token(base, ids), one_token(model, ids))
    texts = (
        lambda: generate(base, prompts, settings.new_tokens),
        lambda: bank.generate(prompts, each, settings.new_tokens),
    )
    return result + row(f"generation, {claim}", *texts)


@peers.quiet()
def steps_over_peers(settings: ModelBenchSettings) -> list[BenchRow]:
    """Our LoRA step over PEFT's and over transformers' full step; no rows where these are not installed."""
    if not peers.can_read(settings.base):
        return []
    batch, rows = settings.batch(), []
    ours = step_of(settings.load_lora(), *batch)
    for claim, r, bar in (
        ("step, LoRA over PEFT's", settings.r, 0.55),
        ("step, LoRA over transformers' full", None, 0.75),
    ):
        actions = {"theirs": peers.training_step_of(peers.load(settings.base, r), *batch), claim: ours}
        rows += measure(actions, settings, {claim: bar})
        del actions
        gc.collect()  # their models hold themselves
    return rows


@peers.quiet()
def epoch_over_peers(settings: ModelBenchSettings) -> list[BenchRow]:
    """An epoch of rows of unlike length: ours in batches of like length, PEFT's shuffled. A batch is as wide as its
    longest row."""
    if not peers.can_read(settings.base):
        return []
    data, longest = settings.unlike_rows(), settings.sequence_length
    claim, steps = f"epoch, {longest // 2} to {longest} tokens a row, over PEFT's", len(data) // settings.batch_size

    def epoch(step_on: Callable, group_by_length: bool) -> Callable[[], None]:
        config = TrainConfig(steps, settings.batch_size, 1e-4, group_by_length=group_by_length)
        taken = [step_on(*batch_of(data, number, config)) for number in range(steps)]

        def run():
            for step in taken:
                step()

        return run

    actions = {"theirs": epoch(partial(peers.training_step_of, peers.load(settings.base, settings.r)), False)}
    actions[claim] = epoch(partial(step_of, settings.load_lora()), True)
    rows = measure(actions, settings, {})
    del actions
    gc.collect()  # their models hold themselves
    return rows


@peers.quiet()
def decoding_over_peers(settings: ModelBenchSettings) -> list[BenchRow]:
    """Our greedy decoding over transformers'; no rows where it is not installed."""
    if not peers.can_read(settings.base):
        return []
    ours, theirs, rows = settings.load(), peers.load(settings.base).eval(), []
    for count in settings.decoded_rows:
        claim = f"decoding {count}, over transformers'"
        actions = {
            "theirs": peers.decoder(theirs, settings.random_ids(count, settings.prompt_length), settings.new_tokens),
            claim: decoder(ours, count, settings),
        }
        rows += measure(actions, settings, {claim: 0.75 if count == 1 else 0.9}, counted=False)
    return rows


# Settings in, rows out.
CLAIMS = (training_steps, steps_over_peers, epoch_over_peers, precisions, decoding, decoding_over_peers, serving)
