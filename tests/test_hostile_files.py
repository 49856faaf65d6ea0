"""Files that are damaged, hostile, or written by others: numbers that cannot be, sizes that would take for ever, and
what means the same in another spelling. Each is refused in one sentence that names the file, or read for what it is."""

import json
import re
import time
from dataclasses import asdict

import pytest
import torch
from faults.mutations import time_limit
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from minilora import GPT, GPTConfig, LoRAConfig, apply_lora, load_adapter, load_model, save_adapter, save_model
from minilora.adapters.inject import find_targets, lora_layers, matches_pattern
from minilora.adapters.patterns import compile_pattern
from minilora.adapters.prompts import SoftPrompt
from minilora.linear4bit import quantize_model
from minilora.quant import Quantization
from minilora.storage import models
from minilora.storage.config import load_config
from minilora.storage.files import check_finite, open_safetensors, parse_json, read_json, write_safetensors
from minilora.storage.get import find_base
from minilora.storage.peft import base_quantization, peft_type
from minilora.storage.prompts import load_prompt, save_prompt
from minilora.storage.training_state import load_training_state, save_training_state, state_digest
from minilora.train import make_optimizer
from minilora.train_settings import TrainConfig

SHAPE = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
Q = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(20).view(2, 10)


def tiny(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SHAPE, "max_position_embeddings": 32, **changes}))


def adapted(targets=("q_proj", "down_proj"), model=None) -> GPT:
    model = apply_lora(model or tiny(), LoRAConfig(r=2, lora_alpha=4, target_modules=list(targets)))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    return model


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, **changes):
    """Sets tensors of a file, "." spelled "__"; its notes stay."""
    with open_safetensors(path) as file:
        metadata = file.metadata()
    save_file(
        {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}, path, metadata
    )


def logits(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


# -- numbers that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_is_found_at_any_place_and_in_any_dtype(dtype, value):
    for size in (1, 7, 64, 1000):
        for place in {0, size // 2, size - 1}:
            tensor = torch.randn(size).to(dtype)
            check_finite(tensor, "w", "file")
            tensor[place] = value
            with pytest.raises(ValueError, match=f"tensor w in file holds {value}"):
                check_finite(tensor, "w", "file")


def test_numbers_at_the_ends_of_a_dtype_are_taken():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ends = torch.finfo(dtype)
        check_finite(torch.tensor([ends.max, ends.min, ends.tiny], dtype=dtype), "w", "file")
    check_finite(torch.empty(0), "w", "file")
    with pytest.raises(ValueError, match="holds 1e[+]300"):
        check_finite(torch.tensor([1.0, 1e300], dtype=torch.float64), "w", "file")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_base_an_adapter_and_a_prompt_with_such_a_number_are_refused(tmp_path, value):
    save_model(tiny(), tmp_path / "base")
    save_adapter(adapted(), tmp_path / "adapter")
    save_prompt(SoftPrompt(tiny(), 3), tmp_path / "prompt")
    loads = {
        "base": load_model,
        "adapter": lambda f: load_adapter(tiny(), f),
        "prompt": lambda f: load_prompt(tiny(), f),
    }
    for folder, load in loads.items():
        (path,) = (tmp_path / folder).glob("*.safetensors")
        load(tmp_path / folder)
        name, tensor = list(load_file(path).items())[-1]
        tensor.view(-1)[3] = value
        edit_tensors(path, **{name.replace(".", "__"): tensor})
        with pytest.raises(ValueError, match=rf"tensor {re.escape(name)} in .*{re.escape(path.name)} holds {value}"):
            load(tmp_path / folder)


def test_a_number_that_the_wanted_dtype_cannot_hold(tmp_path):
    save_model(tiny(), tmp_path)
    edit_tensors(tmp_path / "model.safetensors", model__norm__weight=torch.full((16,), 1e5))
    assert load_model(tmp_path).model.norm.weight[0] == 1e5
    with pytest.raises(ValueError, match="model.norm.weight in .*model.safetensors holds inf"):
        load_model(tmp_path, dtype=torch.float16)


FOUR_BITS = {
    "a negative scale": ("nf4", False, "absmax", lambda t: t.fill_(-1.0), "weight.absmax of -1"),
    "a huge scale": ("nf4", False, "absmax", lambda t: t.fill_(1e30), "weight.absmax of 1e[+]30"),
    "a negative nested scale": ("nf4", True, "nested_absmax", lambda t: t.neg_(), "weight.nested_absmax of -"),
    "a huge nested scale": ("nf4", True, "nested_absmax", lambda t: t.fill_(1e9), "weight.absmax of"),
    "a code that int4 lacks": ("int4", False, "", lambda t: t[3].fill_(0x08), "code 0 in its weight"),
}


@pytest.mark.parametrize("case", FOUR_BITS)
def test_scales_and_codes_that_no_quantization_gives(tmp_path, case):
    scheme, double, part, change, sentence = FOUR_BITS[case]
    save_model(quantize_model(tiny(), Quantization(scheme, 16, double)), tmp_path)
    load_model(tmp_path)
    name = f"{Q}.weight" + (f".{part}" if part else "")
    tensor = load_file(tmp_path / "model.safetensors")[name]
    change(tensor)
    edit_tensors(tmp_path / "model.safetensors", **{name.replace(".", "__"): tensor})
    with pytest.raises(ValueError, match=rf"{re.escape(Q)} in .*model.safetensors.*{sentence}"):
        load_model(tmp_path)


def test_scales_that_rounding_makes_negative_are_taken(tmp_path):
    """Double quantization rounds a scale by up to 1/140 of its nested scale, so a small one may come out below 0."""
    model = tiny(hidden_size=256, intermediate_size=256)
    for layer in (block.mlp.up_proj for block in model.model.layers):
        layer.weight.data.view(16, 16, 256)[:, :2] *= 1e-6  # two rows of the sixteen whose scales share a scale
    quantize_model(model, Quantization("nf4", 16, True))
    scales = model.model.layers[0].mlp.up_proj.quantized.absmax()
    assert scales.min() < 0, f"the case is not met: the least scale is {scales.min():.3g}"
    save_model(model, tmp_path)
    load_model(tmp_path)


# -- a training state that contradicts itself ------------------------------------------------------------------------


def saved_state(path):
    """A state after 2 of 5 steps: its model, optimizer and settings."""
    model, config = adapted(), TrainConfig(5, 1, 0.01)
    optimizer = make_optimizer(model, config)
    for _ in range(2):
        model(IDS).mean().backward()
        optimizer.step()
    history = {"train_loss": [[0, 3.0], [1, 2.5]], "validation_loss": [[0, 3.0], [2, 2.4]], "step_seconds": [0.1, 0.1]}
    settings = json.loads(json.dumps(asdict(config)))
    save_training_state(path, model, optimizer, 2, {**history, "tokens": 40}, settings)
    return model, optimizer, settings


NOTES = {
    "a step below 0": ({"step": "-1"}, "-1 steps are done, of 5"),
    "a step above all": ({"step": "6"}, "6 steps are done, of 5"),
    "no number as step": ({"step": "null"}, "None steps are done"),
    "a step of another time": ({"step": "1"}, "1 steps are done, and its history is of another run"),
    "no history": ({"history": "null"}, "history or its settings are not an object"),
    "settings in a list": ({"settings": "[]"}, "history or its settings are not an object"),
    "a field too many": ({"history": '{"losses": []}'}, "its history is of another run"),
    "a history in words": ({"history": '{"train_loss": "none"}'}, "its history is of another run"),
    "nested notes": ({"history": "[" * 9999 + "]" * 9999}, "header lacks the step, the history"),
}
TENSORS = {
    "counts of another step": (lambda name, t: t + 1 if name.endswith("/step") else t, "optimizer has counted 3"),
    "counts of a step before": (lambda name, t: t - 1 if name.endswith("/step") else t, "optimizer has counted 1"),
    "a negative square": (lambda name, t: -t - 1 if name.endswith("exp_avg_sq") else t, "with numbers below 0"),
    "a moment that is NaN": (lambda name, t: t * torch.nan if name.endswith("exp_avg") else t, "holds nan"),
    "no generator": (
        lambda name, t: torch.zeros_like(t) if name == "random/cpu" else t,
        "not the state of a generator",
    ),
}


@pytest.mark.parametrize("case", [*NOTES, *TENSORS])
def test_a_state_that_contradicts_itself_is_refused_and_changes_nothing(tmp_path, case):
    """Even with a digest that fits."""
    path = tmp_path / "state.safetensors"
    model, optimizer, settings = saved_state(path)
    with open_safetensors(path) as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    notes, sentence = NOTES.get(case, ({}, TENSORS.get(case, (None, ""))[1]))
    if case in TENSORS:
        tensors = {name: TENSORS[case][0](name, tensor) for name, tensor in tensors.items()}
    metadata |= notes
    write_safetensors(path, tensors, metadata | {"digest": state_digest(tensors, metadata)})
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=rf"state\.safetensors.*{sentence}"):
        load_training_state(path, model, optimizer, settings)
    assert all(map(torch.equal, before, model.parameters())), "a refused state changed the model"


def test_any_flipped_byte_of_a_state_is_noticed(tmp_path):
    path = tmp_path / "state.safetensors"
    model, optimizer, settings = saved_state(path)
    whole = path.read_bytes()
    assert load_training_state(path, model, optimizer, settings)[0] == 2
    for place in torch.randint(len(whole), (40,), generator=torch.Generator().manual_seed(0)).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            step, history = load_training_state(path, model, optimizer, settings)
        except ValueError as error:
            assert "state.safetensors" in str(error), error
        else:
            raise AssertionError(f"byte {place} of {len(whole)} was flipped, and step {step} was loaded")


# -- sizes and texts that would take for ever ------------------------------------------------------------------------


def test_a_count_of_layers_is_held_against_the_file_before_any_is_built(tmp_path, monkeypatch):
    save_model(tiny(), tmp_path)
    monkeypatch.setattr(models, "GPT", None)  # building would fail
    for count in (10**6, 900):
        edit_json(tmp_path / "config.json", num_hidden_layers=count)
        with pytest.raises(ValueError, match=f"config.json has num_hidden_layers {count}"):
            load_model(tmp_path)


@pytest.mark.parametrize("name", [*SHAPE, "max_position_embeddings", "num_key_value_heads", "head_dim", "rope_theta"])
def test_sizes_beyond_any_model(tmp_path, name):
    save_model(tiny(), tmp_path)
    for value in (int("9" * 90), *([2**63] if name != "rope_theta" else [])):
        edit_json(tmp_path / "config.json", **{name: value}, rope_parameters=None)
        with pytest.raises(ValueError, match=f"config.json has {name} {value}, where a .*number above 0"):
            load_config(tmp_path)


JSON = {
    "[" * 20000 + "]" * 20000: "nested too deeply",
    '{"a": ' * 20000 + "1" + "}" * 20000: "nested too deeply",
    '{"a": ' + "9" * 400 + "}": "a number of 400 digits",
    '{"a": ' + "9" * 5000 + "}": "a number of 5000 digits",
    '{"a": 1e999}': "'1e999' is larger than any",
    '{"a": -1e999}': "'-1e999' is larger than any",
    '{"a": NaN}': "NaN is no number in JSON",
    '{"a": [-Infinity]}': "-Infinity is no number in JSON",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "'c' stands twice in one object",
    '{"a": "\\ud800"}': "half a character",
    '{"a": 1': "not valid JSON",
}


@pytest.mark.parametrize("text", JSON, ids=lambda text: text[:20])
def test_json_that_python_alone_would_take_or_stumble_over(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"config.json is not valid JSON: .*{JSON[text]}|{JSON[text]}") as caught:
        read_json(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 300 + len(str(path)), caught.value


def test_json_as_transformers_writes_it_is_read():
    text = '{"model_max_length": 1000000000000000019884624838656, "a": 1e-7, "b": "\\ud83d\\ude00", "c": [true, null]}'
    assert parse_json(text) == {
        "model_max_length": 1000000000000000019884624838656,
        "a": 1e-7,
        "b": "😀",
        "c": [True, None],
    }
    assert parse_json('{"a": Infinity}', constants=True) == {"a": torch.inf}


EXPLODING = [
    "(a+)+$",
    "(?i)(?:a|A|b|B|c|C)*!",
    "(?i:(?:a|A|b|B|c|C)*)!",
    "(.*)*z",
    "(.|.)*z",
    "(.|a|.a)+z",
    ".*" * 9 + "z",
    ".?" * 40 + "z",
    "(a?)*",
    "(|a)+b",
    "((.|a)(.|b)){9,}",
]
NO_EXPRESSION = ["(((", "*", "a{99999999999}", "(" * 2000 + ")" * 2000, "x" * 5000, "(?P<a>x"]
# As PEFT's users write them; the last is unsloth's.
COMMON = [
    ".*q_proj",
    r"model\.layers\.(0|1|[5-9])\..*(self_attn|mlp)\.(q|k|v|o|up|down)_proj",
    r"^(?!.*lm_head).*proj$",
]
COMMON += [r".*\.layers\.\d+\..*\.(q_proj|k_proj|v_proj)", r"(.*\.)?[qv]_proj", r"model(\.\w+)?\..*_proj"]
COMMON += [
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|"
    r"gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj)))"
]


@pytest.mark.parametrize("pattern", EXPLODING + NO_EXPRESSION, ids=lambda pattern: pattern[:20])
def test_patterns_that_explode_or_are_none(tmp_path, pattern):
    save_adapter(adapted(), tmp_path)
    for changes in (dict(target_modules=pattern), dict(rank_pattern={pattern: 2}), dict(alpha_pattern={pattern: 2})):
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with time_limit(20), pytest.raises(ValueError, match="adapter_config.json: ") as caught:
            load_adapter(tiny(), tmp_path)
        assert len(str(caught.value)) < 500 + len(str(tmp_path)), f"{len(str(caught.value))} characters were said"
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("pattern", COMMON, ids=lambda pattern: pattern[:20])
def test_patterns_in_use_match_as_ever(pattern):
    names = [name for name, _ in tiny().named_modules() if name.endswith("_proj")]
    assert find_targets(names, pattern) == [name for name in names if re.fullmatch(pattern, name)]
    if len(pattern) < 100:  # a key of rank_pattern is tried at the start and after each dot, so it may hold less
        found = [name for name in names if matches_pattern(pattern, name)]
        assert found == [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]


def test_the_costliest_pattern_that_is_taken_ends_soon():
    pattern, name, began = (
        compile_pattern(r"(.*\.)?(.*a.*b.*c)$"),
        "model.layers.10.self_attn." + "x" * 34,
        time.perf_counter(),
    )
    assert pattern.match(name) is None
    assert time.perf_counter() - began < 10


ADAPTER_VALUES = [
    (dict(target_modules=["q_proj", 1]), "an entry that is not a name"),
    (dict(target_modules=["q_proj"] * 9999), "9,999 entries"),
    (dict(rank_pattern={"q_proj": True}), "is True; it must be a whole number"),
    (dict(alpha_pattern={"q_proj": True}), "is True; it must be a number above 0"),
    (dict(alpha_pattern={"q_proj": 10**80}), "it must be a number above 0 and at most"),
    (dict(r=10**9), "r is 1000000000; it must be a whole number from 1 to 65,536"),
    (dict(r=2**62), "it must be a whole number from 1 to 65,536"),
    (dict(lora_alpha=1e300), "it must be a number above 0 and at most"),
]


@pytest.mark.parametrize(("changes", "sentence"), ADAPTER_VALUES, ids=[sentence for _, sentence in ADAPTER_VALUES])
def test_values_of_an_adapter_that_cannot_be(tmp_path, changes, sentence):
    save_adapter(adapted(), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{sentence}"):
        load_adapter(tiny(), tmp_path)


# -- files that others write and that mean the same ------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_with_pefts_copy_of_the_base(tmp_path, tied):
    """PEFT writes the head's own weight too, whether or not it is tied: taken when it is this base's."""
    model = adapted(["q_proj", "lm_head"], tiny(tie_word_embeddings=tied))
    save_adapter(model, tmp_path)
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    weight = model.lm_head.base_layer.weight.detach().clone()
    save_file({**load_file(path), name: weight}, path, {"format": "pt"})
    assert torch.equal(logits(load_adapter(tiny(tie_word_embeddings=tied), tmp_path)), logits(model))
    half = tiny(tie_word_embeddings=tied).to(torch.bfloat16)
    assert lora_layers(load_adapter(half, tmp_path)), "the copy in float32 of a base that is held in bfloat16"
    weight[3, 4] += 1
    save_file({**load_file(path), name: weight}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"adapter_model.safetensors holds {re.escape(name)}.*this model has another"):
        load_adapter(tiny(tie_word_embeddings=tied), tmp_path)


def test_a_tied_model_under_the_heads_name_alone(tmp_path):
    model = tiny(tie_word_embeddings=True)
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, {"format": "pt"})
    found = load_model(tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert found.lm_head.weight is found.model.embed_tokens.weight, "one matrix must stay one"


@pytest.mark.parametrize("layers", [0, 1, [1], [0, 1]], ids=str)
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["self_attn.v_proj", "model.layers.0.mlp.up_proj"]])
def test_layers_to_transform(tmp_path, layers, targets):
    """By PEFT's rule: of the targets, those in these layers; 0 is a layer and not "off"."""
    chosen = layers if isinstance(layers, list) else [layers]
    names = [name for name, module in tiny().named_modules() if isinstance(module, torch.nn.Linear)]
    names = [name for name in find_targets(names, targets) if int(name.split(".")[2]) in chosen]
    save_adapter(adapted(names), tmp_path)
    edit_json(tmp_path / "adapter_config.json", target_modules=targets, layers_to_transform=layers, layers_pattern=None)
    loaded = load_adapter(tiny(), tmp_path)
    assert [name for name, _ in lora_layers(loaded)] == names
    assert torch.equal(logits(loaded), logits(adapted(names)))


def test_an_adapter_of_another_base_is_refused_in_one_sentence(tmp_path):
    """By the note of its base, before hundreds of tensors are compared."""
    save_adapter(adapted(model=tiny(hidden_size=32, num_hidden_layers=4)), tmp_path)
    with pytest.raises(ValueError, match="was trained on another base than this model") as caught:
        load_adapter(tiny(), tmp_path)
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="and 5 more.*and 3 more") as caught:  # as PEFT writes it, or by force
        load_adapter(tiny(), tmp_path, force=True)
    assert len(str(caught.value)) < 1500, f"{len(str(caught.value))} characters"


def test_pickles_and_names_of_the_hub_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tiny(), "base")
    save_adapter(adapted(), "adapter")
    for folder, weights, pickle in (
        ("base", "model.safetensors", "pytorch_model.bin"),
        ("adapter", "adapter_model.safetensors", "adapter_model.bin"),
    ):
        (tmp_path / folder / weights).rename(tmp_path / folder / pickle)
        with pytest.raises(FileNotFoundError, match=f"{pickle} is a pickle.*save_pretrained writes safetensors"):
            load_model(folder) if folder == "base" else load_adapter(tiny(), folder)
    for load in (find_base, load_model, peft_type, base_quantization, lambda name: load_adapter(tiny(), name)):
        with pytest.raises(FileNotFoundError, match="hf download some-org/a_model-1.0 --local-dir"):
            load("some-org/a_model-1.0")
    with pytest.raises(FileNotFoundError) as caught:
        load_model("nowhere/at/all")
    assert "hf download" not in str(caught.value)


# -- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_count_in_a_gguf_header_is_held_against_the_file(tmp_path):
    """The library would count to it: bytes added at the end made the empty reads beyond it fit."""
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "model.gguf", tiny(vocab_size=262, num_key_value_heads=1))
    whole, key = path.read_bytes(), b"tokenizer.ggml.token_type"
    place = whole.index(key) + len(key) + 8  # behind the types of the value and of its items
    assert whole[place : place + 8] == (262).to_bytes(8, "little"), "the count of token types is not where it should be"
    load_model(path)
    for count in (2**40, 10**6):
        for more in range(4):
            path.write_bytes(whole[:place] + count.to_bytes(8, "little") + whole[place + 8 :] + bytes(more))
            with pytest.raises(ValueError, match=r"model\.gguf cannot be read.*leads beyond the end of the file"):
                load_model(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gguf_tensor_that_is_not_finite(tmp_path, value):
    pytest.importorskip("gguf")
    model = tiny(vocab_size=262, num_key_value_heads=1)
    model.model.norm.weight.data[3] = value
    with pytest.raises(ValueError, match=rf"tensor model.norm.weight in .*model\.gguf holds {value}"):
        load_model(write_gguf(tmp_path / "model.gguf", model))


def test_a_file_without_tensors_is_refused_by_what_it_lacks(tmp_path):
    save_model(tiny(), tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    assert models.stored_dtype(tmp_path) == torch.float32
    with pytest.raises(ValueError, match="config.json has num_hidden_layers 2, for 0 tensors in all"):
        load_model(tmp_path)
