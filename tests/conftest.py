"""What several test files share."""

import shutil

import pytest
import torch

from minilora.config import LoRAConfig
from minilora.experiments.methods import Experiment
from minilora.experiments.run import open_base
from minilora.model import GPT, GPTConfig
from minilora.quant import Quantization
from minilora.storage.models import save_model
from minilora.text.batches import Batches
from minilora.text.datasets import Dataset
from minilora.text.tokenizer import train_tokenizer
from minilora.text.world import World
from minilora.train_settings import TrainConfig


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A small tokenizer, trained in a moment on a few hundred documents of the world."""
    texts = [document.text for document in World().documents(400, seed="tokenizer of the tests")]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=800)


@pytest.fixture(scope="session")
def base_folder(tokenizer, tmp_path_factory):
    """A base of one narrow layer with the small tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(tokenizer.vocab_size, 16, 32, 1, 2, 1, max_position_embeddings=64)), folder)
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    return open_base(folder)


@pytest.fixture(scope="session")
def make_experiment(base_folder):
    """A function that gives an experiment of three steps on random tokens; any field of it can be changed."""
    ids = torch.randint(800, (12, 16), generator=torch.Generator().manual_seed(1))
    rows = Batches(ids, ids.clone()), Batches(ids[:4], ids[:4].clone())
    dataset = Dataset("words", *rows, floor=None, task=None, prompts=["The", "A man", "Notes: "])

    def make(method="lora", **changes) -> Experiment:
        training = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, seed=5)
        lora = LoRAConfig(2, 4, target_modules="all-linear")
        fields = dict(base=base_folder, dataset=dataset, training=training, lora=lora)
        fields |= dict(quantization=Quantization(block_size=16), virtual_tokens=3, loraplus_ratio=4)
        return Experiment(method=method, **fields | changes)

    return make
