"""A base in 4 bits on disk: bitsandbytes' layout, what is damaged in it, and the adapters that belong to it."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minilora import (
    GPT,
    GPTConfig,
    LoRAConfig,
    MemoryMeter,
    apply_lora,
    load_adapter,
    load_model,
    merge_lora,
    save_adapter,
    save_model,
)
from minilora.adapters.inject import lora_layers
from minilora.levels import LEVELS, SCALE_LEVELS
from minilora.linear4bit import quantize_model, quantized_layers
from minilora.quant import QLORA, Quantization, dequantize, quantize
from minilora.storage.fingerprint import fingerprint
from minilora.storage.peft import base_quantization

Q = "model.layers.0.self_attn.q_proj"
CONFIG = GPTConfig(64, 48, 80, 2, 4, 2, max_position_embeddings=64, attention_bias=True)
IDS = torch.arange(40).view(2, 20)


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **changes}))


@pytest.fixture
def floats(tmp_path):
    """A float model's folder."""
    save_model(make_model(), tmp_path / "floats")
    return tmp_path / "floats"


def saved(tmp_path, scheme="nf4", double_quant=True):
    save_model(quantize_model(make_model(), Quantization(scheme, 16, double_quant)), tmp_path / "quantized")
    return tmp_path / "quantized"


def random_adapter(model: GPT) -> GPT:
    apply_lora(model, LoRAConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        layer.lora_A.data.normal_(generator=generator)
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS)


# -- the way there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4"])
def test_round_trip_is_bit_for_bit(tmp_path, scheme, double_quant):
    model = quantize_model(make_model(tie_word_embeddings=True), Quantization(scheme, 16, double_quant))
    save_model(model, tmp_path / "quantized")
    again = load_model(tmp_path / "quantized")
    ours, theirs = quantized_layers(model), quantized_layers(again)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for name, layer in ours.items():
        expected, found = layer.quantized, theirs[name].quantized
        assert vars(expected).keys() == vars(found).keys() and expected.tensors.keys() == found.tensors.keys()
        for field, tensor in expected.tensors.items():
            assert torch.equal(tensor, found.tensors[field]), f"{name}: {field} changed on the way"
        assert (expected.scheme, expected.block_size, expected.dtype) == (found.scheme, found.block_size, found.dtype)
    assert torch.equal(logits(model), logits(again)), (
        f"logits differ by up to {(logits(model) - logits(again)).abs().max():.3g}"
    )
    assert fingerprint(model) == fingerprint(again), "the loaded model should have the mark of the saved one"


@pytest.mark.parametrize("scheme, double_quant", [("nf4", True), ("fp4", False), ("int4", True)])
def test_quantizing_while_loading_is_quantizing_after(floats, scheme, double_quant):
    settings = Quantization(scheme, 32, double_quant)
    while_loading = load_model(floats, quantization=settings)
    after = quantize_model(load_model(floats), settings)
    assert fingerprint(while_loading) == fingerprint(after), "codes or scales differ with the moment of quantizing"
    assert torch.equal(logits(while_loading), logits(after)), (
        f"logits differ by up to {(logits(while_loading) - logits(after)).abs().max():.3g}"
    )
    q_proj = while_loading.get_submodule(Q)
    assert torch.equal(q_proj.bias, after.get_submodule(Q).bias) and q_proj.bias.device.type == "cpu"


def test_layers_in_4_bits_on_disk_stay_as_they_are(tmp_path):
    folder = saved(tmp_path, "fp4")
    kept = load_model(folder, quantization=QLORA)
    assert {layer.quantization.scheme for layer in quantized_layers(kept).values()} == {"fp4"}
    assert fingerprint(kept) == fingerprint(load_model(folder)), "the codes on disk should stay as they are"


def test_quantizing_while_loading_never_holds_the_float_model(tmp_path):
    """Under the float model plus one layer, as promised, and in fact far under the float model."""
    model = make_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    save_model(model, tmp_path / "floats")
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    meter = MemoryMeter(nn.Module())
    with meter:
        load_model(tmp_path / "floats", quantization=QLORA)
    peak = meter.peak.total - size  # the meter counts the empty model on the meta device too, which has no memory
    assert peak < 0.4 * size, f"peak {peak} bytes, the float model has {size}"


def test_the_names_and_values_are_those_of_bitsandbytes(tmp_path):
    tensors = load_file(saved(tmp_path) / "model.safetensors")
    parts = {name.removeprefix(f"{Q}."): tensor for name, tensor in tensors.items() if name.startswith(f"{Q}.weight")}
    n = 48 * 48
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    state = kinds.pop("weight.quant_state.bitsandbytes__nf4")
    assert state[0] == torch.uint8
    assert kinds == {
        "weight": (torch.uint8, (n // 2, 1)),
        "weight.absmax": (torch.uint8, (n // 16,)),
        "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_absmax": (torch.float32, (1,)),
        "weight.nested_quant_map": (torch.float32, (256,)),
    }
    settings = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert settings.pop("nested_offset") > 0
    assert settings == {
        "quant_type": "nf4",
        "blocksize": 16,
        "dtype": "float32",
        "shape": [48, 48],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["load_in_4bit"], config["bnb_4bit_quant_type"]) == (
        "bitsandbytes",
        True,
        "nf4",
    )
    assert config["bnb_4bit_use_double_quant"] is True


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_file_that_another_program_wrote(floats, tmp_path, storage):
    """Its tensors made by hand here, the codes also in bfloat16 storage, as sharded training asks for."""
    tensors = load_file(floats / "model.safetensors")
    weight = tensors.pop(f"{Q}.weight").to(torch.bfloat16)
    quantized = quantize(weight, "nf4", 64)
    tensors[f"{Q}.weight"] = quantized.codes.view(storage)[:, None]
    tensors[f"{Q}.weight.absmax"] = quantized.scales
    tensors[f"{Q}.weight.quant_map"] = LEVELS["nf4"]
    state = b'{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[48,48]}'
    tensors[f"{Q}.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    save_file(tensors, floats / "model.safetensors", {"format": "pt"})
    model = load_model(floats)
    assert list(quantized_layers(model)) == [Q]
    found = model.get_submodule(Q).quantized
    assert torch.equal(dequantize(found), dequantize(quantized)) and found.dtype == torch.bfloat16, (
        f"{found.dtype}, off by up to {(dequantize(found) - dequantize(quantized)).abs().max():.3g}"
    )


# -- what is damaged -------------------------------------------------------------------------------------------------


def change_state(tensors, **changes):
    key = f"{Q}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


DAMAGE = {
    "truncated codes": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-8]}), "has a weight of 1144 values"),
    "codes of another type": (lambda t: t.update({f"{Q}.weight": torch.ones(48, 48)}), "has a weight of 9216 values"),
    "no scales": (lambda t: t.pop(f"{Q}.weight.absmax"), "lacks weight.absmax"),
    "too few scales": (lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"][1:]}), "weight.absmax of 143"),
    "scales in floats": (lambda t: t.update({f"{Q}.weight.absmax": torch.ones(144)}), "torch.float32.*torch.uint8"),
    "scales that are NaN": (
        lambda t: t.update({f"{Q}.weight.nested_absmax": torch.tensor([torch.nan])}),
        "weight.nested_absmax with NaN or infinity",
    ),
    "an offset that is infinite": (lambda t: change_state(t, nested_offset=torch.inf), "Infinity is no number in JSON"),
    "an offset that is a word": (lambda t: change_state(t, nested_offset="big"), "a number as nested_offset"),
    "no nested scales": (lambda t: t.pop(f"{Q}.weight.nested_absmax"), "lacks weight.nested_absmax"),
    "a part too many": (lambda t: t.update({f"{Q}.weight.SCB": torch.ones(3)}), "has weight.SCB, which its"),
    "other levels": (lambda t: t[f"{Q}.weight.quant_map"].add_(0.01), "weight.quant_map with other levels than.*nf4"),
    "other levels of scales": (
        lambda t: t.update({f"{Q}.weight.nested_quant_map": SCALE_LEVELS[:9].clone()}),
        "weight.nested_quant_map with other levels",
    ),
    "a wrong shape": (lambda t: change_state(t, shape=[24, 96]), r"shape \[24, 96\].*makes it \[48, 48\]"),
    "an unknown dtype": (lambda t: change_state(t, dtype="int9"), "dtype 'int9'.*float32"),
    "a wrong block size": (lambda t: change_state(t, blocksize=32), "weight.absmax of 144 values.*needs 72"),
    "an impossible block size": (lambda t: change_state(t, blocksize=0), "block_size is 0.*16 to 4096"),
    "another scheme": (lambda t: change_state(t, quant_type="fp4"), "says quant_type 'fp4'"),
    "another nested block": (lambda t: change_state(t, nested_blocksize=128), "needs nested_blocksize 256"),
    "no JSON": (
        lambda t: t.update({f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.tensor([123, 34], dtype=torch.uint8)}),
        "not the JSON it should be",
    ),
    "no quant state": (
        lambda t: t.pop(f"{Q}.weight.quant_state.bitsandbytes__nf4"),
        r"q_proj.weight.absmax|has type U8",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    """In one sentence that names the layer and the file."""
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change, sentence = DAMAGE[case]
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(folder)
    assert Q in str(caught.value) and "quantized" in str(caught.value), caught.value


def test_a_head_in_4_bits_is_refused(tmp_path):
    model = quantize_model(make_model(), skip=())
    with pytest.raises(ValueError, match="lm_head"):
        save_model(model, tmp_path / "all")
        load_model(tmp_path / "all")


@pytest.mark.parametrize(
    "settings, named",
    [({"quant_method": "gptq", "bits": 4}, "'gptq'"), ({"load_in_8bit": True}, "8 bits"), ("awq", "awq")],
)
def test_other_quantizations_are_refused_by_name(floats, settings, named):
    config = json.loads((floats / "config.json").read_text()) | {"quantization_config": settings}
    (floats / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"config.json has a quantization_config of .*{named}.*only bitsandbytes' 4 bits"
    ):
        load_model(floats)


def test_a_weight_that_cannot_be_quantized_is_named(floats):
    tensors = load_file(floats / "model.safetensors")
    tensors[f"{Q}.weight"][3, 5] = torch.inf
    save_file(tensors, floats / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{re.escape(Q)}.weight in .*model.safetensors holds inf"):
        load_model(floats, quantization=QLORA)


# -- adapters on a base in 4 bits ------------------------------------------------------------------------------------


def test_the_fingerprint_tells_bases_apart(floats):
    prints = {
        fingerprint(load_model(floats)),
        fingerprint(load_model(floats, quantization=QLORA)),
        fingerprint(load_model(floats, quantization=Quantization("fp4"))),
        fingerprint(load_model(floats, quantization=Quantization(double_quant=False))),
    }
    assert len(prints) == 4, f"four bases, and {len(prints)} marks"
    changed = load_model(floats, quantization=QLORA)
    before = fingerprint(changed)
    assert fingerprint(random_adapter(load_model(floats, quantization=QLORA))) == before, "an adapter is not the base"
    changed.get_submodule(Q).codes[7] ^= 16
    assert fingerprint(changed) != before, "one code changed"


def test_an_adapter_says_how_its_base_was_stored(floats, tmp_path):
    settings = Quantization("fp4", 32, False)
    model = random_adapter(quantize_model(load_model(floats), settings))
    save_adapter(model, tmp_path / "adapter")
    assert base_quantization(tmp_path / "adapter") == settings, (
        f"noted {base_quantization(tmp_path / 'adapter')}, not {settings}"
    )
    again = load_adapter(quantize_model(load_model(floats), settings), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model)), (
        f"logits differ by up to {(logits(again) - logits(model)).abs().max():.3g}"
    )
    with pytest.raises(ValueError, match=r"another base.*its base was in 4 bits \(fp4\), this model is in floats"):
        load_adapter(load_model(floats), tmp_path / "adapter")
    load_adapter(load_model(floats), tmp_path / "adapter", force=True)
    save_adapter(random_adapter(load_model(floats)), tmp_path / "plain")
    assert base_quantization(tmp_path / "plain") is None


def test_a_note_that_cannot_be_read_is_named(floats, tmp_path):
    save_adapter(random_adapter(quantize_model(load_model(floats))), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for note in ("", "{", "[]", "{}", "null", '{"scheme": "nf5", "block_size": 64, "double_quant": true}'):
        save_file(load_file(path), path, metadata | {"base_quantization": note})
        with pytest.raises(ValueError, match="adapter_model.safetensors has a note of its base's quantization"):
            base_quantization(tmp_path / "adapter")


def test_merging_into_4_bits_is_refused_and_nothing_changes():
    model = random_adapter(quantize_model(make_model()))
    before, said = fingerprint(model), logits(model)
    with pytest.raises(ValueError, match="4 bits.*dequantize_model"):
        merge_lora(model)
    assert fingerprint(model) == before and torch.equal(logits(model), said), "a refusal changed the model"
    assert not any(layer.merged for _, layer in lora_layers(model))
