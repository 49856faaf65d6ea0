"""Soft prompts and prefixes on disk: PEFT's layout to the letter, and a refusal for each file that does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_storage_adapters import adapted, base, edit_config, edit_tensors, logits

from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.linear4bit import quantize_model
from minilora.quant import Quantization
from minilora.storage.adapters import save_adapter
from minilora.storage.fingerprint import fingerprint
from minilora.storage.peft import base_quantization, peft_type
from minilora.storage.prompts import load_prompt, save_prompt

METHODS = {"PROMPT_TUNING": SoftPrompt, "PREFIX_TUNING": PrefixTuning}
N, WIDTH = 5, {"PROMPT_TUNING": 16, "PREFIX_TUNING": 2 * 2 * 2 * 4}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(method: str, model=None, length: int = N):
    """A prompt of random numbers, as if trained."""
    prompt = METHODS[method](model or base(), length, [1])
    with torch.no_grad():
        prompt.prompt_embeddings.normal_(generator=torch.Generator().manual_seed(1))
    return prompt


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture
def saved(method, tmp_path) -> Path:
    save_prompt(trained(method), tmp_path / "prompt")
    return tmp_path / "prompt"


def assert_refused(directory: Path, message: str, error=ValueError, model=None, **options):
    model = base() if model is None else model
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message) as caught:
        load_prompt(model, directory, **options)
    assert "\n" not in str(caught.value)
    assert [parameter.requires_grad for parameter in model.parameters()] == before, "the model is left alone"


# The layout and the round trip


def test_the_files_are_those_of_peft(saved, method):
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    heads, own = {
        "PROMPT_TUNING": ((4, 16), {"prompt_tuning_init": "RANDOM"}),
        "PREFIX_TUNING": ((2, 8), {"prefix_projection": False}),  # as keys have them
    }[method]
    assert json.loads((saved / CONFIG).read_text()) == {
        "peft_type": method,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_virtual_tokens": N,
        "token_dim": heads[1],
        "num_attention_heads": heads[0],
        "num_layers": 2,
        "num_transformer_submodules": 1,
        **own,
    }
    tensors = load_file(saved / WEIGHTS)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "prompt_embeddings": (torch.float32, (N, WIDTH[method]))
    }
    with safe_open(saved / WEIGHTS, "pt") as file:
        metadata, base_s = file.metadata(), fingerprint(base())
    assert metadata.keys() == {"format", "base_fingerprint"} and metadata["format"] == "pt", metadata
    noted = metadata["base_fingerprint"]
    assert noted == base_s, f"the file notes another base than the one it was saved from: {noted}, not {base_s}"
    assert peft_type(saved) == method


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, N])
def test_a_saved_prompt_gives_the_same_model_again(method, tmp_path, dtype, length):
    prompt = trained(method, base(dtype), length)
    save_prompt(prompt, tmp_path)
    loaded = load_prompt(base(dtype), tmp_path)
    assert type(loaded) is METHODS[method] and loaded.length == length
    assert torch.equal(loaded.prompt_embeddings, prompt.prompt_embeddings)
    assert loaded.prompt_embeddings.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(prompt))
    assert length == 0 or not torch.equal(logits(loaded)[:, -10:], logits(base(dtype)))
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trainable == ["prompt_embeddings"]


def test_loading_draws_nothing(saved):
    model = base()
    before = torch.get_rng_state()
    load_prompt(model, saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_in_half_precision_is_read_as_float32(saved):
    edit_tensors(saved, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    loaded = load_prompt(base(), saved).prompt_embeddings
    assert loaded.dtype == torch.float32 and torch.equal(
        loaded, load_file(saved / WEIGHTS)["prompt_embeddings"].float()
    )


def test_a_config_written_by_peft_is_read(saved, method):
    """Every field that PEFT 0.21 writes, and with the sizes left to the model."""
    own = {
        "PROMPT_TUNING": dict(prompt_tuning_init_text=None, tokenizer_kwargs=None, tokenizer_name_or_path="somewhere"),
        "PREFIX_TUNING": dict(encoder_hidden_size=8, init_weights=None, prefix_projection=True),
    }[method]
    edit_config(saved, auto_mapping=None, modules_to_save=None, revision="main", peft_version="0.21.2", **own)
    assert torch.equal(logits(load_prompt(base(), saved)), logits(trained(method)))
    edit_config(saved, token_dim=None, num_attention_heads=None, num_layers=..., num_transformer_submodules=...)
    assert torch.equal(logits(load_prompt(base(), saved)), logits(trained(method)))


def test_the_note_of_a_base_in_four_bits(method, tmp_path):
    shape = dict(hidden_size=64, num_attention_heads=4)
    prompt = trained(method, quantize_model(base(torch.float32, **shape), Quantization("nf4")))
    save_prompt(prompt, tmp_path)
    assert base_quantization(tmp_path) == Quantization("nf4", block_size=64, double_quant=True)
    again = load_prompt(quantize_model(base(torch.float32, **shape), base_quantization(tmp_path)), tmp_path)
    assert torch.equal(logits(again), logits(prompt))
    with pytest.raises(ValueError, match="another base"):
        load_prompt(base(torch.float32, **shape), tmp_path)


def test_another_base_is_refused_unless_forced(saved, method):
    assert_refused(saved, "was trained on another base than this model; force=True", model=base(seed=9))
    prompt = load_prompt(base(seed=9), saved, force=True)
    assert torch.equal(prompt.prompt_embeddings, trained(method).prompt_embeddings)


def test_a_file_without_a_fingerprint_is_any_bases(saved):
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors, saved / WEIGHTS, {"format": "pt"})
    load_prompt(base(seed=9), saved)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_virtual_tokens=...), "has num_virtual_tokens None, which is not a whole number"),
        (dict(num_virtual_tokens="5"), "has num_virtual_tokens '5'"),
        (dict(num_virtual_tokens=64), "length is 64; of the model's 64 positions"),
        (dict(num_virtual_tokens=-1), "length is -1"),
        (dict(num_virtual_tokens=6), r"wrong shape: prompt_embeddings: expected \(6, \d+\), found \(5, \d+\)"),
        (dict(token_dim=7), r"is of another shape than this model: token_dim 7 \(here \d+\)"),
        (dict(num_attention_heads=8, num_layers=3), r"num_attention_heads 8 \(here \d\), num_layers 3 \(here 2\)"),
        (dict(num_transformer_submodules=2), r"num_transformer_submodules 2 \(here 1\)"),
        (dict(modules_to_save=["lm_head"]), r"not supported: modules_to_save \['lm_head'\]"),
        (dict(some_switch=True), "not supported: some_switch True"),
        (dict(peft_type="IA3"), "holds an adapter of IA3, and load_prompt knows PROMPT_TUNING, PREFIX_TUNING$"),
        (dict(peft_type=None), "the peft_type None, which is not the name of a method"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, changes, message):
    edit_config(saved, **changes)
    assert_refused(saved, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.clear(), r"missing: prompt_embeddings \(5, \d+\)"),
        (lambda t: t.update(more=torch.ones(2)), r"not expected: more \(2,\)"),
        (lambda t: t.update(prompt_embeddings=torch.ones(5, 3)), r"expected \(5, \d+\), found \(5, 3\)"),
        (lambda t: t.update(prompt_embeddings=torch.ones(5, 16).int()), "prompt_embeddings in .* has type I32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, edit, message):
    edit_tensors(saved, edit)
    assert_refused(saved, message)


def test_damaged_and_missing_files_are_named(saved):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-40])
    assert_refused(saved, f"{WEIGHTS} is not a whole safetensors file")
    (saved / WEIGHTS).unlink()
    assert_refused(saved, f"there is no file .*{WEIGHTS}", FileNotFoundError)
    (saved / CONFIG).write_text("{")
    assert_refused(saved, f"{CONFIG} is not valid JSON")
    (saved / CONFIG).unlink()
    assert_refused(saved, f"there is no file .*{CONFIG}", FileNotFoundError)
    assert_refused(saved / "nothing", "is not a folder", FileNotFoundError)


def test_a_lora_folder_says_who_loads_it(tmp_path):
    save_adapter(adapted(), tmp_path)
    assert peft_type(tmp_path) == "LORA"
    assert_refused(tmp_path, "holds an adapter of LORA, .*; load_adapter loads it")


def test_one_method_does_not_load_as_the_other(saved, method):
    edit_config(saved, peft_type="PREFIX_TUNING" if method == "PROMPT_TUNING" else "PROMPT_TUNING")
    assert_refused(saved, "is of another shape than this model")


def test_only_plain_models_are_loaded_onto_and_only_prompts_saved(saved, tmp_path):
    assert_refused(saved, "the model has LoRA layers", model=adapted())
    with pytest.raises(ValueError, match="in front of a GPT, and this is a (SoftPrompt|PrefixTuning)"):
        load_prompt(load_prompt(base(), saved), saved)
    with pytest.raises(ValueError, match="save_prompt writes a SoftPrompt or a PrefixTuning, and this is a GPT"):
        save_prompt(base(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; saving needs a folder"):
        save_prompt(load_prompt(base(), saved), tmp_path / "file")
