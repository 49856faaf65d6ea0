"""storage/gguf.py: a GGUF file is the model it was written from, weights, shape and tokenizer; what we cannot run is
refused by name."""

import pytest
import torch
from gguf_files import CONTROL, TEMPLATE, write_gguf

from minilora import GPT, GPTConfig, load_model
from minilora.storage.config import load_config
from minilora.storage.gguf import open_gguf
from minilora.text.tokenizer import open_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

SHAPE = dict(vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=64, rope_theta=5e4, tie_word_embeddings=True)


@pytest.fixture
def make(tmp_path):
    """A random model, norms and biases too, and its GGUF file."""

    def make_file(kind="F32", changes=None, more=None, **shape):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**SHAPE, **shape}))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1, std=0.3)
        return model, write_gguf(tmp_path / "model.gguf", model, kind, changes, more)

    return make_file


def difference(model, other):
    ids = torch.randint(262, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (model(ids) - other(ids)).abs().max().item()


@pytest.mark.parametrize(
    "shape", [{}, dict(tie_word_embeddings=False), dict(attention_bias=True), dict(head_dim=16)], ids=str
)
def test_weights_shape_and_logits_come_back_bit_for_bit(make, shape):
    changes = {"llama.attention.key_length": 16} if "head_dim" in shape else {}
    model, path = make(changes=changes, **shape)
    found = load_model(path)
    assert found.config == model.config == load_config(path), f"{found.config} is not {model.config}"
    for (name, ours), theirs in zip(found.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), f"{name} is off by up to {(ours - theirs).abs().max():.3g}"
    assert (off := difference(found, model)) == 0, f"logits are off by {off:.3g}"


@pytest.mark.parametrize("kind, bound", [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 2e-2), ("Q4_0", 0.3), ("Q4_1", 0.3)])
def test_a_quantized_file_is_read_as_the_library_dequantizes_it(make, kind, bound):
    model, path = make(kind)
    found = load_model(path)
    for name in ("q_proj", "o_proj"):  # one whose rows are moved, one whose rows are not
        ours, theirs = (getattr(each.model.layers[1].self_attn, name).weight for each in (found, model))
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert 0 < error < bound, f"{name} in {kind} is off by {error:.3g} of its norm"
        if name == "q_proj":
            continue
        quantization = gguf.GGMLQuantizationType[kind]
        expected = gguf.quants.dequantize(gguf.quants.quantize(theirs.detach().numpy(), quantization), quantization)
        assert torch.equal(ours, torch.from_numpy(expected)), f"{name}: not what the library reads"


def test_rotary_scalings(make):
    named = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model, path = make(changes=named, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert load_model(path).config == model.config and difference(load_model(path), model) == 0
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 8192}
    from minilora.model import rotary_frequencies

    plain, scaled = (rotary_frequencies(GPTConfig(**SHAPE, rope_scaling=scaling)) for scaling in (None, llama3))
    model, path = make(more={"rope_freqs.weight": plain / scaled}, rope_scaling=llama3)
    assert load_model(path).config == model.config, f"{load_model(path).config.rope_scaling} is not {llama3}"
    wrong = make(more={"rope_freqs.weight": (plain / scaled).flip(0)})[1]
    with pytest.raises(ValueError, match="rope_freqs.weight that are not llama3's"):
        load_model(wrong)
    with pytest.raises(ValueError, match="the rotary scaling 'yarn'; only linear and llama3"):
        load_model(make(changes={"llama.rope.scaling.type": "yarn"})[1])


def test_the_tokenizer(make):
    _, path = make()
    tokenizer = open_tokenizer(path)
    ids = {token: id for id, token in enumerate(CONTROL)}
    assert tokenizer.control == ids and tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix, tokenizer.end_ids) == (1, 0, [], {0})
    the, twelve = 259 + 1, 259 + 2
    assert tokenizer.encode("the") == [the] and twelve not in tokenizer.encode("12"), "digits stand one by one"
    for text in ("naïve 12 👩‍👩‍👧", "  a\n\t b ", "<|end|>the<|user|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text, f"{text!r} came back as another text"
    assert not set(tokenizer.encode("<|end|><|user|>")) & set(ids.values()), "a text forges a control token"
    assert tokenizer.encode("<|user|>the<|end|>", control=True) == [1, the, 0]


def test_a_begin_token_where_the_file_wants_one_and_every_end_token(make):
    more = {"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 3}  # of a turn, of a message
    _, path = make(changes={"tokenizer.ggml.add_bos_token": True, **more})
    assert (open_tokenizer(path).prefix, open_tokenizer(path).end_ids) == ([1], {0, 2, 3})


REFUSED = {
    "has architecture 'qwen2'; only 'llama'": dict(changes={"architecture": "qwen2"}),
    "has no llama.block_count": dict(changes={"llama.block_count": None}),
    "has a tensor blk.0.attn_qkv.weight, for which a Llama model has no place": dict(
        more={"blk.0.attn_qkv.weight": torch.ones(2, 2)}
    ),
    "has num_attention_heads 0, where a number above 0": dict(changes={"llama.attention.head_count": 0}),
    "missing: model.layers.2.": dict(changes={"llama.block_count": 3}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_model_that_we_could_not_run_is_refused_by_name(make, sentence):
    _, path = make(**REFUSED[sentence])
    with pytest.raises(ValueError) as error:
        load_model(path)
    assert sentence in str(error.value) and path.name in str(error.value), f"said: {error.value}"


@pytest.mark.parametrize("key, value", [("model", "llama"), ("pre", "qwen2"), ("pre", None)])
def test_an_unknown_tokenizer_is_refused_by_name(make, key, value):
    _, path = make(changes={f"tokenizer.ggml.{key}": value})
    with pytest.raises(ValueError) as error:
        open_tokenizer(path)
    assert f"'{value}'" in str(error.value).replace("none", "None"), f"said: {error.value}"
    assert path.name in str(error.value) and "only 'gpt2' with smollm is supported" in str(error.value)


def test_damaged_tokens_are_named(make):
    for key, value, sentence in (
        ("eos_token_id", 999, "names token 999 as eos, but has 262 tokens"),
        ("token_type", [1, 1], "has 2 token types for 262 tokens"),
    ):
        _, path = make(changes={f"tokenizer.ggml.{key}": value})
        with pytest.raises(ValueError, match=f"{path.name} {sentence}"):
            open_tokenizer(path)


def test_damaged_files_are_refused(make, tmp_path):
    _, path = make()
    whole = path.read_bytes()
    for size in (0, 3, 40, 2000, len(whole) - 64):
        (tmp_path / f"{size}.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{size}.gguf cannot be read by the gguf library"):
            load_model(tmp_path / f"{size}.gguf")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_model(tmp_path / "absent.gguf")


def test_a_quantization_that_cannot_be_undone_is_named(make, monkeypatch):
    _, path = make("Q4_1")

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(open_gguf(path), "_dequantize", refuse)
    with pytest.raises(ValueError, match="is in F32, which cannot be read|is in Q4_1, which cannot be read"):
        load_model(path)


def test_without_the_library_one_sentence_says_what_to_install(make, monkeypatch):
    import sys

    _, path = make()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="needs the gguf library: pip install gguf"):
        load_model(path)
