"""Simulated bytes, held against the same training step on real tensors and against arithmetic."""

import pytest
import torch

from minilora.adapters.inject import apply_lora
from minilora.experiments.simulate import MemoryReport, count_base_parameters, simulate
from minilora.lora import LoRAConfig
from minilora.memory import KINDS, MemoryMeter
from minilora.model import GPT, GPTConfig
from minilora.quant import quantize_model
from minilora.train import TrainConfig, make_optimizer, set_gradient_checkpointing, training_step

BASE = GPTConfig.preset("base", num_hidden_layers=3)  # six query heads, two key/value heads, tied embeddings
B, T = 4, 96
NAMES = [*KINDS, "peak"]


def real_step(method: str, dtype=torch.float32, autocast=False, checkpointing=False, accumulation=1) -> MemoryMeter:
    """The second training step on real tensors, under the meter."""
    torch.manual_seed(0)
    model = GPT(BASE).to(dtype)
    if method == "qlora":
        quantize_model(model)
    if method != "full":
        apply_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    config = TrainConfig(
        steps=2,
        batch_size=B,
        learning_rate=1e-3,
        accumulation_steps=accumulation,
        precision="bfloat16" if autocast else "float32",
    )
    set_gradient_checkpointing(model, checkpointing)
    optimizer = make_optimizer(model, config)
    meter = MemoryMeter(model, optimizer)
    ids = torch.randint(BASE.vocab_size, (B, T))
    for _ in range(2):
        with meter:
            training_step(model, optimizer, ids, ids, config)
    return meter


def assert_same_bytes(report: MemoryReport, meter: MemoryMeter):
    real, simulated = meter.highest, report.as_dict()
    for name in NAMES:
        error = simulated[name] / real[name] - 1
        assert abs(error) < 0.01, f"{name}: simulated {simulated[name]}, real {real[name]}, off by {error:.2%}"
    assert abs(report.at_peak.total / meter.peak.total - 1) < 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_simulated_equals_real(method, checkpointing):
    report = simulate(
        BASE, method, batch_size=B, sequence_length=T, dtype="float32", gradient_checkpointing=checkpointing
    )
    assert_same_bytes(report, real_step(method, checkpointing=checkpointing))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_simulated_equals_real_in_bfloat16(method):
    assert_same_bytes(simulate(BASE, method, B, T), real_step(method, torch.bfloat16))


def test_simulated_equals_real_under_autocast_and_accumulation():
    report = simulate(BASE, "full", B, T, dtype="float32", autocast=True, accumulation_steps=2)
    assert_same_bytes(report, real_step("full", autocast=True, accumulation=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_formula_equals_simulation(method, dtype):
    report = simulate(BASE, method, 1, 16, dtype=dtype)
    for name, predicted in report.predicted.items():
        assert predicted == getattr(report, name), f"{name}: formula {predicted}, simulated {getattr(report, name)}"


@pytest.mark.parametrize("changes", [{}, dict(attention_bias=True, mlp_bias=True, head_dim=10, hidden_size=60)])
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_formula(tied, changes):
    config = GPTConfig.preset("base", num_hidden_layers=2, tie_word_embeddings=tied, **changes)
    counted = sum(parameter.numel() for parameter in GPT(config).parameters())
    assert count_base_parameters(config) == counted


def test_lora_has_few_gradients_and_little_state():
    full, lora = (simulate(BASE, method, B, T, dtype="float32") for method in ("full", "lora"))
    assert lora.gradients + lora.optimizer < 0.03 * (full.gradients + full.optimizer)
    assert lora.activations < full.activations and lora.peak < full.peak


def test_qlora_stores_the_linears_in_4_bits_and_keeps_lora_s_activations():
    """With and without double quantization; of a layer's float weight only one copy exists at a time."""
    lora, qlora = (simulate(BASE, method, B, T, dtype="float32") for method in ("lora", "qlora"))
    linears = BASE.num_hidden_layers * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)
    saved = lora.weights - qlora.weights
    assert 0.99 < saved / (linears * (4 - 4.13 / 8)) < 1.01, f"{saved} bytes less of {4 * linears}"
    plain = simulate(
        BASE, "qlora", B, T, dtype="float32", quantization=dict(scheme="nf4", block_size=64, double_quant=False)
    )
    assert 0.37 < 8 * (plain.weights - qlora.weights) / linears < 0.374, "0.373 bits a weight for scales in float32"
    assert abs(qlora.activations - lora.activations) <= 4 * 192 * 512, (qlora.activations, lora.activations)
    assert (qlora.gradients, qlora.optimizer) == (lora.gradients, lora.optimizer)
    assert qlora.total_parameters == lora.total_parameters


def test_lora_options_reach_the_layers():
    def lora(**options):
        return simulate(BASE, "lora", B, T, dtype="float32", **options)

    assert lora(r=4).trainable_parameters * 2 == lora(r=8).trainable_parameters
    everywhere = lora(target_modules="all-linear")
    each_layer = 8 * (2 * (192 + 192) + 2 * (192 + 64) + 3 * (192 + 512))  # r (in + out): q o, k v, the MLP's three
    assert everywhere.trainable_parameters == BASE.num_hidden_layers * each_layer
    assert lora(lora_dropout=0.1).activations > lora().activations, "dropout keeps a mask for backward"


def test_checkpointing_and_micro_batches_lower_activations():
    plain = simulate(BASE, "full", B, T)
    for name, option in (("checkpointing", dict(gradient_checkpointing=True)), ("halves", dict(accumulation_steps=2))):
        less = simulate(BASE, "full", B, T, **option)
        assert less.activations < 0.7 * plain.activations, f"{name}: {less.activations} of {plain.activations}"


def test_activations_grow_with_tokens_and_not_with_their_square():
    """The attention under simulation keeps no (T, T) scores: four times the sequence, four times the bytes."""
    short, long = (simulate(BASE, "full", 1, length).activations for length in (128, 512))
    assert 3.5 < long / short < 4.1, f"{long / short:.2f} times the bytes for 4 times the tokens"


def test_seven_billion_parameters_full():
    report = simulate("llama-2-7b", "full", batch_size=1, sequence_length=2048)
    assert report.total_parameters == report.trainable_parameters == 6_738_415_616
    assert report.weights == report.gradients == 2 * 6_738_415_616  # 12.55 GiB in bfloat16
    assert 4 * report.weights < report.peak < 5 * report.weights, f"peak {report.peak / 2**30:.2f} GiB"


def test_lora_on_a_slice_of_seventy_billion():
    """Four of 80 layers at full width, batch 2: the shapes are real, the test is quick."""
    config = GPTConfig.preset("llama-2-70b", num_hidden_layers=4)
    report = simulate(config, "lora", batch_size=2, sequence_length=4096)
    assert report.predicted["weights"] == report.weights
    assert report.trainable_parameters == 4 * 8 * (8192 + 8192 + 8192 + 1024)  # r (in + out) of q and v, each layer
    assert report.peak > report.weights + report.activations


def test_table_says_what_was_measured():
    table = simulate(BASE, "lora", 2, 32).table()
    for word in ("LoRA r=8 on q_proj, v_proj", "batch 2 x 32", "trainable params: ", "peak", "formula", "MiB", *KINDS):
        assert word in table, f"{word!r} is missing in\n{table}"


def test_as_dict_has_the_names_of_results_json():
    assert list(simulate(BASE, "lora", 1, 8).as_dict()) == ["weights", "gradients", "optimizer", "activations", "peak"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(config="llama-9"), "unknown preset"),
        (
            dict(method="qlora", quantization=dict(scheme="nf5", block_size=64, double_quant=True)),
            "unknown scheme 'nf5'",
        ),
        (dict(method="qlora", quantization=dict(scheme="nf4", block_size=48, double_quant=True)), "block_size is 48"),
        (dict(method="magic"), "unknown method 'magic'"),
        (dict(dtype="int3"), "unknown dtype 'int3'"),
        (dict(sequence_length=513), "513.*1 to 512"),
        (dict(sequence_length=0), "sequence_length is 0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size=3, accumulation_steps=2), "accumulation_steps"),
        (dict(method="lora", r=0), "r is 0"),
        (dict(method="lora", target_modules=["nothing"]), "nothing"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        simulate(**{"config": BASE, "sequence_length": 16, **arguments})


def test_simulation_leaves_torch_as_it_was():
    with pytest.raises(ValueError):
        simulate(BASE, "lora", 1, 8, target_modules=["nothing"])
    simulate(BASE, "full", 1, 8)
    assert torch.get_default_dtype() == torch.float32
    assert type(torch.ones(1)) is torch.Tensor, "a fake tensor came out of an ordinary call"
