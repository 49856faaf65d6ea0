"""Starts of A and B held against PEFT's: the same A, B and rest of W, and an adapter that it can load."""

import pytest
import torch

from minilora import LoRAConfig, apply_lora, load_adapter, lora_layers, save_adapter
from minilora.adapters.inject import adapter_parameters
from minilora.adapters.starts import loftq
from minilora.quant import Quantization, dequantize

REASON = "held against transformers, peft and bitsandbytes, which `pip install -e '.[parity]'` installs"
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
bitsandbytes = pytest.importorskip("bitsandbytes", reason=REASON)

BAR = 1e-5
OPTIONS = {
    "plain": {},
    "rsLoRA": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"q_proj": 6}, alpha_pattern={"up_proj": 3}),
    "DoRA": dict(use_dora=True),
}


def settings(start, options):
    return dict(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=start, **OPTIONS[options])


def theirs_with(model, start, options):
    return peft.get_peft_model(model, peft.LoraConfig(**settings(start, options), task_type="CAUSAL_LM")).eval()


def ours_with(model, start, options):
    return apply_lora(model, LoRAConfig(**settings(start, options)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_start_equals_peft_s(both, assert_close, assert_same_logits, start, options):
    base, ours = both(attention_bias=True)
    theirs, ours = theirs_with(base, start, options), ours_with(ours, start, options)
    for name, layer in lora_layers(ours):
        peer = theirs.base_model.model.get_submodule(name)
        A, B = peer.lora_A.default.weight, peer.lora_B.default.weight
        assert_close(f"{name}: BA", layer.lora_B @ layer.lora_A, B @ A, BAR)
        assert_close(f"{name}: A", layer.lora_A.data, A.data, BAR)
        assert_close(f"{name}: B", layer.lora_B.data, B.data, BAR)
        rest = layer.base_layer.weight - layer.scaling * layer.lora_B @ layer.lora_A  # PEFT keeps it in W's place
        assert_close(f"{name}: the rest of W", rest.detach(), peer.base_layer.weight.data, BAR)
        if "DoRA" in options:
            magnitude = peer.lora_magnitude_vector.default.weight
            assert_close(f"{name}: magnitude", layer.lora_magnitude_vector.data, magnitude.data, BAR)
    assert_same_logits("float32 logits", ours, theirs, 1e-4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_we_save_after_training_loads_in_peft_on_the_original_base(
    both, assert_same_logits, tmp_path, start, options
):
    base, ours = both(attention_bias=True)
    ours_with(ours, start, options)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(ours):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    logits = assert_same_logits("float32 logits", ours, theirs, 1e-4)
    with torch.no_grad(), theirs.disable_adapter():
        ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
        assert (theirs(ids).logits - logits).abs().max() > 0.05, "the adapter changes next to nothing"


def test_peft_s_own_conversion_of_a_pissa_run_does_the_same(both, assert_same_logits, tmp_path):
    """PEFT writes the same plain adapter where it is given the start's own file."""
    base, ours = both()
    theirs = theirs_with(base, "pissa", "plain")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_same_logits("float32 logits", load_adapter(ours, tmp_path / "plain"), theirs, 1e-4)


def test_loftq_equals_peft_s_where_the_scaling_is_one(llama, assert_close):
    """PEFT's rounds, on the same 4 bits; its loftq_init wants a GPU, so its steps are taken one by one."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    W = llama().model.layers[0].mlp.up_proj.weight.data
    rest = W
    for rounds in range(1, 4):
        packed, state = bitsandbytes.functional.quantize_4bit(rest, quant_type="nf4", compress_statistics=False)
        rounded = bitsandbytes.functional.dequantize_4bit(packed, state)
        parts = _low_rank_decomposition(W - rounded, reduced_rank=8)
        error = (W - rounded - parts["L"] @ parts["R"]).norm() / W.norm()
        Q, A, B, errors = loftq(W, 8, 1.0, Quantization(double_quant=False), rounds)
        assert abs(errors[-1] - error) < BAR, f"round {rounds}: {errors} and {error}"
        if errors[-1] == min(errors):
            assert_close(f"round {rounds}: Q", dequantize(Q), rounded, BAR)
            assert_close(f"round {rounds}: BA", B @ A, parts["L"] @ parts["R"], BAR)
        rest = W - parts["L"] @ parts["R"]
