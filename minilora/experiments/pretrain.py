"""The shipped base, from nothing: its text, its tokenizer, its training, and the record of how it was made.

The text is the tiny world and, for one token in seven, the documentation that ships with Python, so that the base also
speaks some real English. The loop is the same `train` that fine-tunes.
"""

import itertools
import platform
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from minilora.inference.evaluate import evaluate_world
from minilora.model import GPT, GPTConfig
from minilora.ranges import PRETRAINING_STEPS
from minilora.storage.config import MODEL_CONFIG
from minilora.storage.files import make_folder, write_json
from minilora.storage.folders import check_free
from minilora.storage.locks import locked
from minilora.storage.models import MODEL_WEIGHTS, save_model
from minilora.storage.training_state import check_resume
from minilora.text import words
from minilora.text.batches import Batches, pack
from minilora.text.english import python_documentation
from minilora.text.tokenizer import AnyTokenizer, Tokenizer, train_tokenizer
from minilora.text.world import World, nats_per_token
from minilora.train import train
from minilora.train_settings import TrainConfig

ROW = 256  # tokens per row: several whole documents
ENGLISH_SHARE = 0.14  # of all tokens


def pretraining_config(steps: int, seed: int) -> TrainConfig:
    PRETRAINING_STEPS.check("steps", steps)
    # Eight rows are few, but for a model so small more steps teach more than better gradients do.
    config = TrainConfig(steps, batch_size=8, learning_rate=3e-3, warmup_steps=min(200, steps // 10), seed=seed)
    config = replace(config, final_learning_rate=0.01, weight_decay=0.1, precision="bfloat16")
    return replace(config, eval_every=max(1, steps // 20), save_every=500)


def make_tokenizer(path: Path) -> Tokenizer:
    """BPE on a sample of the mix, and on each word of the world in quotes: so a word is one token also without a space
    before it. The newcomers' names are left out. Pretraining never meets them, so tokens of their own would keep their
    random embeddings, which in fine-tuning are frozen."""
    lists = [name for name in sorted(vars(words)) if name.isupper() and name != "NEWCOMER_NAMES"]
    quoted = [f'"{word}"' for name in lists for word in getattr(words, name)] * 300
    world = [document.text for document in World().documents(8000, seed="tokenizer")]
    return train_tokenizer(world + python_documentation() + quoted, path, GPTConfig.preset("base").vocab_size)


def pretraining_rows(tokenizer: AnyTokenizer, tokens: int, seed: int) -> Batches:
    """At least `tokens` tokens of whole documents, world and English shuffled together, in rows of ROW tokens."""
    room = ROW - 2  # beside <bos> and <eos>
    texts = map(tokenizer.encode, python_documentation())
    english = [ids[start : start + room] for ids in texts for start in range(0, len(ids), room)]
    rng = random.Random(seed)
    rng.shuffle(english)
    documents, count = [], 0
    for ids in itertools.cycle(english):  # a long run needs more English than there is, and repeats it
        if count >= tokens * ENGLISH_SHARE:
            break
        documents.append(ids)
        count += len(ids)
    with tqdm(desc="text", total=tokens, initial=count, unit=" tokens", disable=None) as bar:
        for batch in itertools.count():
            if count >= tokens:
                break
            for document in World().documents(10_000, seed=f"pretrain {seed} {batch}"):
                documents.append(tokenizer.encode(document.text))
                count += len(documents[-1])
            bar.update(count - bar.n)
    rng.shuffle(documents)
    return pack(documents, ROW, tokenizer)


def pretrain(out: Path, steps: int, seed: int = 0, device: str = "cpu", resume: bool = False, progress: bool = True):
    """Writes a base model, its tokenizer and `record.json` to the folder `out`. Returns the record.

    Raises ValueError, before anything is written, for steps or a seed out of range, where another run writes `out`,
    where `out` holds anything but a model, and for an unfinished run there that is not to be resumed.
    """
    config = pretraining_config(steps, seed)
    make_folder(out)
    with locked(out, patience=0):
        check_resume(out / "training_state.safetensors", resume)
        check_free(out, (MODEL_WEIGHTS, MODEL_CONFIG, Tokenizer.file_name))
        return _pretrain(out, config, device, resume, progress)


def _pretrain(out: Path, config: TrainConfig, device: str, resume: bool, progress: bool) -> dict:
    steps, seed = config.steps, config.seed
    with TemporaryDirectory() as apart:  # it goes to `out` together with the model
        tokenizer = make_tokenizer(Path(apart) / Tokenizer.file_name)
    data = pretraining_rows(tokenizer, steps * config.batch_size * ROW, seed)
    documents = World().documents(300, seed="pretrain validation")
    encoded = [tokenizer.encode(document.text) for document in documents]
    torch.manual_seed(seed)
    model = GPT(GPTConfig.preset("base")).to(device)
    validation, state = pack(encoded, ROW, tokenizer), out / "training_state.safetensors"
    how: dict[str, Any] = dict(state_path=state, resume=resume, description="pretrain", progress=progress)
    began = time.perf_counter()
    history = train(model, data, config, validation, **how)
    wall_seconds = time.perf_counter() - began
    save_model(model, out, {Tokenizer.file_name: tokenizer.definition})
    report = evaluate_world(model.float(), tokenizer, count=300)
    machine: dict[str, str | int] = {"processor": platform.processor() or platform.machine(), "device": device}
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    record = {
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "tokens": history.tokens,
        "training_seconds": round(sum(history.step_seconds)),
        "wall_seconds": round(wall_seconds),
        "machine": machine,
        "config": asdict(config),
        "train_loss": [[step, round(loss, 4)] for step, loss in history.train_loss[:: max(1, steps // 200)]],
        "validation_loss": [[step, round(loss, 4)] for step, loss in history.validation_loss],
        "validation_floor": round(nats_per_token(documents, encoded), 4),
        "evaluation": report.scores | {"loss": round(report.loss, 4), "floor": round(report.floor, 4)},
    }
    write_json(out / "record.json", record)
    state.unlink()
    return record
