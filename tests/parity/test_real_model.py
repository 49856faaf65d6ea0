"""SmolLM2-135M-Instruct as `python -m minilora get smollm2` writes it, held against transformers on the same folder."""

import random

import pytest
import torch

transformers = pytest.importorskip("transformers")

from minilora import generate, load_model  # noqa: E402
from minilora.storage.get import MODELS  # noqa: E402
from minilora.text.chat import chat_ids, encode_prompt  # noqa: E402
from minilora.text.tokenizer import open_tokenizer  # noqa: E402

FOLDER = MODELS / "smollm2"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="python -m minilora get smollm2 has not been run")

PIECES = [
    "def f(x):\n",
    "    return x ** 2",
    "\t",
    "  ",
    "     ",
    "\n\n",
    "\r\n",
    "12345",
    "3.14",
    "0x1F",
    "Ⅷ",
    "٣٤",
    "½",
]
PIECES += [
    "😀",
    "👩‍👩‍👧",
    "🏴‍☠️",
    "é",
    "e\u0301",
    "ß",
    "你好",
    "こんにちは",
    "שלום",
    "\u00a0",
    "\u200b",
    "\ufeff",
    "\x00",
    "\x7f",
]
PIECES += [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "<repo_name>",
    "it's",
    "I'LL",
    "don’t",
    "—",
    "#!/",
]
PIECES += [
    "http://a.b/?q=1&r=2",
    "{'a': [1, 2]}",
    "The",
    " the",
    "antidisestablishmentarianism",
    "CamelCase_snake",
    "\\n",
]


def awkward(count: int) -> list[str]:
    choose = random.Random(0)
    return ["".join(choose.choices(PIECES, k=choose.randint(1, 8))) for _ in range(count)]


@pytest.fixture(scope="module")
def both():
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return theirs.eval(), load_model(FOLDER)


@pytest.fixture(scope="module")
def tokenizers():
    return transformers.AutoTokenizer.from_pretrained(FOLDER), open_tokenizer(FOLDER)


@pytest.mark.parametrize("text", awkward(200), ids=range(200))
def test_token_ids(tokenizers, text):
    theirs, ours = tokenizers
    assert ours.encode(text, control=True) == theirs(text)["input_ids"], "with control tokens"
    ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.encode(text) == ids and ours.decode(ids) == text, "with control tokens as letters"


CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "\n Hi \n"}],
    [{"role": role, "content": f"{role} 😀 {n}"} for n, role in enumerate(("user", "assistant", "user"))],
]


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_chats(tokenizers, messages):
    theirs, ours = tokenizers
    for answer in (True, False):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=answer, tokenize=True)["input_ids"]
        assert chat_ids(ours, messages, answer) == expected


def test_logits(both, tokenizers, assert_close):
    theirs, ours = both
    texts = [encode_prompt(tokenizers[1], chat) for chat in CHATS] + [tokenizers[1].encode("\n".join(PIECES))]
    for number, ids in enumerate(texts):
        with torch.no_grad():
            expected, found = theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids]))
        assert expected.abs().max() > 10
        assert_close(f"logits of text {number}", found, expected, 1e-5)


def test_weights_of_their_own_gguf_loader(tmp_path):
    """Both libraries read one small GGUF file; the real one is not kept by `get`."""
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    from minilora import GPT, GPTConfig

    shape = GPTConfig(262, 64, 128, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
    write_gguf(tmp_path / "tiny.gguf", GPT(shape), "Q4_1")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours, state = load_model(tmp_path / "tiny.gguf"), theirs.state_dict()
    for name, parameter in ours.named_parameters():
        off = (parameter - state[name]).abs().max().item()
        assert off == 0, f"{name} differs by up to {off:.3g}"


def test_greedy_answers(both, tokenizers):
    theirs, ours = both
    for chat in CHATS:
        ids = chat_ids(tokenizers[1], chat)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
        (found,) = generate(ours, [ids], 24, eos_id=tokenizers[1].eos_id)
        assert found == [id for id in expected if id != tokenizers[1].eos_id]
