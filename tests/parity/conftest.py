"""What the parity tests share: the peers, imported quietly, and small random Llamas as transformers makes them."""

import contextlib
import os
import warnings
from pathlib import Path

import pytest
import torch

from minilora import load_model

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the peers are imported: they never look for anything on the network
with warnings.catch_warnings(), contextlib.suppress(ModuleNotFoundError):  # the test files say what is missing
    warnings.simplefilter("ignore")  # what they warn of while being imported is theirs to mend
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

SHAPE = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("ignore")
            )  # the peers' warnings; everywhere else, ours are errors


@pytest.fixture
def llama():
    """Makes a LlamaForCausalLM whose weights, norms and biases are all random; its logits are of order 1."""

    def make(dtype=torch.float32, seed=0, **changes):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
                else:
                    parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
        model.generation_config.eos_token_id = None
        return model.to(dtype).eval()

    return make


@pytest.fixture
def both(llama, tmp_path):
    """Makes one, saves it to `tmp_path / "base"`, and reads it with both libraries: theirs and ours."""

    def make(dtype=torch.float32, **changes):
        llama(**changes).save_pretrained(tmp_path / "base")
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        return theirs.eval(), load_model(tmp_path / "base", dtype=dtype)

    return make


@pytest.fixture
def ids():
    """Random token ids, (rows, tokens)."""
    return lambda rows, tokens: torch.randint(97, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def assert_close(record_property):
    """Two tensors differ by `bar` at most; the largest difference goes into the report (`--junitxml`)."""

    def check(what, ours, theirs, bar):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, f"{what}: {ours.dtype} and {theirs.dtype}"
        difference = (ours - theirs).abs().max().item()
        record_property(what, difference)
        assert difference <= bar, f"{what} differ by {difference:.1e}, the bar is {bar:.0e}"

    return check


@pytest.fixture
def assert_same_logits(assert_close, ids):
    """Ours and theirs say the same of the same tokens, and the logits are large enough for that to mean something."""

    def check(what, ours, theirs, bar, shape=(2, 24)):
        tokens = ids(*shape)
        with torch.no_grad():
            expected, found = theirs(tokens).logits, ours(tokens)
        assert 1 < expected.abs().max() < 100, f"the logits go up to {expected.abs().max():.1f}"
        assert_close(what, found, expected, bar)
        return expected

    return check
