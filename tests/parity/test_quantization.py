"""Four bits held against bitsandbytes: codes, scales and values bit for bit, models on disk, and a step of QLoRA."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from minilora import linear4bit, load_adapter, load_model, lora_layers, quant, save_model
from minilora.levels import LEVELS, SCALE_LEVELS
from minilora.storage.fingerprint import fingerprint

REASON = "held against transformers, peft and bitsandbytes, which `pip install -e '.[parity]'` installs"
bitsandbytes = pytest.importorskip("bitsandbytes", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
reference = bitsandbytes.functional

SCHEMES = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture(autouse=True)
def uncompiled():
    """It compiles what its kernels for CPUs leave out, anew for every shape: seconds each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def samples(*shape, dtype):
    """By name, data that rounds in different ways."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator)
    levels = [LEVELS[scheme].sort().values for scheme in ("fp4", "nf4")]
    middles = torch.cat([torch.ones(1), *((level[:-1] + level[1:]) / 2 for level in levels)])  # ties, if absmax is 1
    data = {
        "normal": normal * 0.02,
        "heavy-tailed": normal.sign() * normal.abs().pow(5),
        "midpoints": middles[torch.randint(len(middles), shape, generator=generator)],
        "grid": torch.randint(-24, 25, shape, generator=generator) / 24,
        "sparse": normal * (torch.rand(shape, generator=generator) < 0.01),  # many blocks of zeros
        "zeros": torch.zeros(shape),
    }
    return {name: values.to(dtype) for name, values in data.items()}


def test_levels_equal():
    for scheme in ("fp4", "nf4"):
        assert torch.equal(LEVELS[scheme], reference.get_4bit_type(scheme, "cpu")), scheme
    assert torch.equal(SCALE_LEVELS, reference.create_dynamic_map())


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["fp4", "nf4"])
def test_codes_scales_and_values_equal(scheme, dtype, block_size):
    for shape in ((1,), (2,), (101,), (4096,), (33, 65), (70, 128), (3, 5, 17)):
        for name, weight in samples(*shape, dtype=dtype).items():
            what = f"{name} {shape}"
            codes, state = reference.quantize_4bit(weight, blocksize=block_size, quant_type=scheme)
            got = quant.quantize(weight, scheme, block_size)
            wrong = (got.codes != codes.flatten()).sum()
            assert not wrong, f"{what}: {wrong} of {len(got.codes)} bytes of codes differ"
            assert torch.equal(got.scales, state.absmax), f"{what}: scales differ"
            expected = reference.dequantize_4bit(codes, state).reshape(shape)  # one dimension comes back as two
            values = quant.dequantize(got)
            assert values.dtype == expected.dtype
            off = (values != expected).sum()
            assert not off, f"{what}: {off} of {weight.numel()} values differ"


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("scheme", ["fp4", "nf4"])
def test_double_quantized_scales_equal(scheme, block_size):
    generator = torch.Generator().manual_seed(1)
    for shape, spread in itertools.product([(1024, 1024), (601, 64)], [0, 1]):
        weight = torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp() ** spread
        codes, state = reference.quantize_4bit(
            weight, blocksize=block_size, quant_type=scheme, compress_statistics=True
        )
        got = quant.quantize(weight, scheme, block_size, double_quant=True)
        assert torch.equal(got.nested_scales, state.state2.absmax) and torch.equal(got.nested_offset, state.offset)
        # its code for CPUs finds a level by a table that is coarse near zero
        steps = (got.scales.int() - state.absmax.int()).abs()
        same = (steps == 0).double().mean().item()
        assert same >= 0.99 and steps.max() <= 4, f"{same:.2%} of the codes are equal, the rest within {steps.max()}"
        read = replace(got, scales=state.absmax)  # its codes of scales, read by ours
        assert torch.equal(got.codes, codes.flatten())
        assert torch.equal(quant.dequantize(read), reference.dequantize_4bit(codes, state)), "values differ"


# Models. All rows are of whole blocks: bitsandbytes' CPU kernel decodes others wrongly.


@pytest.fixture
def quantized(llama, tmp_path):
    """Makes a Llama that bitsandbytes quantized and transformers saved, and returns its folder; floats beside it."""

    def make(scheme, double_quant):
        llama().save_pretrained(tmp_path / "floats")
        settings = dict(load_in_4bit=True, bnb_4bit_quant_type=scheme, bnb_4bit_use_double_quant=double_quant)
        config = transformers.BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
        load(tmp_path / "floats", quantization_config=config).save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return make


def load(folder, **settings):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def in_floats(folder):
    """Outside training their layers in 4 bits compute in bfloat16 on CPUs that can; dequantized ones do not."""
    return load(folder).dequantize(dtype=torch.float32).eval()


@pytest.mark.parametrize("scheme, double_quant", SCHEMES)
def test_transformers_and_we_read_each_other(quantized, tmp_path, assert_same_logits, scheme, double_quant):
    """What they wrote, what we write of that, and what we quantized ourselves."""
    theirs = quantized(scheme, double_quant)
    ours = load_model(theirs)
    assert len(linear4bit.quantized_layers(ours)) == 14
    assert_same_logits("float32 logits in 4 bits", ours, in_floats(theirs), 1e-5)
    save_model(ours, tmp_path / "back")
    expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "back"))
    assert expected.keys() == found.keys()
    differing = [name for name in found if "quant_state" not in name and not torch.equal(found[name], expected[name])]
    assert not differing, f"{differing} changed on the way"
    settings = (json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "back"))
    expected, found = (config["quantization_config"].items() for config in settings)
    assert found <= expected, f"{dict(found)} is not what transformers says, {dict(expected)}"
    assert_same_logits("float32 logits of our file in 4 bits", ours, in_floats(tmp_path / "back"), 1e-5)
    own = load_model(tmp_path / "floats", quantization=quant.Quantization(scheme, double_quant=double_quant))
    assert double_quant or fingerprint(own) == fingerprint(ours)  # see the note on their codes of scales above
    save_model(own, tmp_path / "own")
    assert_same_logits("float32 logits of our own 4 bits", own, in_floats(tmp_path / "own"), 1e-5)


@pytest.mark.parametrize("scheme, double_quant", SCHEMES)
def test_a_step_of_qlora_has_the_same_gradients(quantized, tmp_path, ids, assert_close, scheme, double_quant):
    folder = quantized(scheme, double_quant)
    base = peft.prepare_model_for_kbit_training(load(folder), use_gradient_checkpointing=False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config).train()
    generator = torch.Generator().manual_seed(2)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_model(folder), tmp_path / "adapter").train()
    tokens = ids(2, 48)
    logits = ours(tokens), theirs(tokens).logits
    assert_close("float32 logits of QLoRA", *(value.detach() for value in logits), 1e-5)
    for value in logits:
        F.cross_entropy(value[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, layer in lora_layers(ours):
        peer = theirs.base_model.model.get_submodule(name)
        assert isinstance(peer.base_layer, bitsandbytes.nn.Linear4bit) and isinstance(
            layer.base_layer, linear4bit.Linear4bit
        )
        for part, parameter in layer.named_parameters(recurse=False):
            found, expected = parameter.grad, getattr(peer, part).default.weight.grad
            size = expected.norm()
            assert_close(f"{name}.{part}: float32 gradients over their norm", found / size, expected / size, 1e-5)
