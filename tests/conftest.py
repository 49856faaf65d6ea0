"""What several test files share."""

import pytest

from minilora.text.tokenizer import train_tokenizer
from minilora.text.world import World


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A small tokenizer, trained in a moment on a few hundred documents of the world."""
    texts = [document.text for document in World().documents(400, seed="tokenizer of the tests")]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=800)
