"""Simulated bytes, held against the same training step on real tensors and against arithmetic."""

import pytest
import torch

from minilora.adapters.inject import apply_lora
from minilora.config import LoRAConfig
from minilora.experiments.simulate import MemoryReport, bytes_in_4_bits, count_base_parameters, simulate
from minilora.linear4bit import quantize_model, quantized_layers
from minilora.memory import KINDS, Bytes, MemoryMeter
from minilora.model import GPT, GPTConfig
from minilora.quant import Quantization
from minilora.train import make_optimizer, set_gradient_checkpointing, training_step
from minilora.train_settings import IGNORE, TrainConfig

BASE = GPTConfig.preset("base", num_hidden_layers=3)  # six query heads, two key/value heads, tied embeddings
B, T = 4, 96
NAMES = [*KINDS, "peak"]


def real_step(
    method: str, dtype=torch.float32, autocast=False, checkpointing=False, accumulation=1, counted=T - 1
) -> MemoryMeter:
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
    labels = ids.clone()
    labels[:, : T - counted] = IGNORE
    for _ in range(2):
        with meter:
            training_step(model, optimizer, ids, labels, config)
    return meter


def assert_same_bytes(report: MemoryReport, meter: MemoryMeter):
    real, simulated = meter.highest, report.as_dict()
    for name in NAMES:
        error = simulated[name] / real[name] - 1
        assert abs(error) < 0.01, f"{name}: simulated {simulated[name]}, real {real[name]}, off by {error:.2%}"
    assert abs(report.at_peak.total / meter.peak.total - 1) < 0.01, (
        f"at the peak: simulated {report.at_peak}, real {meter.peak}"
    )


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


@pytest.mark.parametrize("counted", [0, 24])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_simulated_equals_real_where_few_tokens_count(method, counted):
    report = simulate(BASE, method, B, T, dtype="float32", accumulation_steps=2, counted_tokens=counted)
    assert_same_bytes(report, real_step(method, accumulation=2, counted=counted))


def test_fewer_counted_tokens_need_fewer_logits():
    """Twelve bytes for a place and a word: log-probabilities and two gradients, in float32."""
    config = GPTConfig.preset("base", num_hidden_layers=1, vocab_size=32_000)
    most, few = (simulate(config, "lora", B, T, counted_tokens=counted) for counted in (T - 1, 24))
    expected = 12 * 32_000 * B * (T - 1 - 24)
    fell = most.peak - few.peak
    assert abs(fell / expected - 1) < 0.01, f"the peak should fall by {expected} bytes, and falls by {fell}"
    default = simulate(config, "lora", B, T)
    assert default.as_dict() == most.as_dict(), f"all count by default: {most.as_dict()}, not {default.as_dict()}"


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
    assert count_base_parameters(config) == counted, (
        f"counted {counted}, the formula is off by {count_base_parameters(config) - counted}"
    )


def test_lora_has_few_gradients_and_little_state():
    full, lora = (simulate(BASE, method, B, T, dtype="float32") for method in ("full", "lora"))
    assert lora.gradients + lora.optimizer < 0.03 * (full.gradients + full.optimizer), (
        f"{lora.gradients + lora.optimizer} bytes, of full fine-tuning's {full.gradients + full.optimizer}"
    )
    assert lora.activations < full.activations and lora.peak < full.peak


def test_qlora_stores_the_linears_in_4_bits_and_keeps_lora_s_activations():
    """With and without double quantization; of a layer's float weight only one copy exists at a time."""
    lora, qlora = (simulate(BASE, method, B, T, dtype="float32") for method in ("lora", "qlora"))
    linears = BASE.num_hidden_layers * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)
    saved = lora.weights - qlora.weights
    assert 0.99 < saved / (linears * (4 - 4.13 / 8)) < 1.01, f"{saved} bytes less of {4 * linears}"
    plain = simulate(BASE, "qlora", B, T, dtype="float32", quantization=Quantization(double_quant=False))
    assert 0.37 < 8 * (plain.weights - qlora.weights) / linears < 0.374, "0.373 bits a weight for scales in float32"
    assert abs(qlora.activations - lora.activations) <= 4 * 192 * 512, (qlora.activations, lora.activations)
    assert (qlora.gradients, qlora.optimizer) == (lora.gradients, lora.optimizer), (
        f"lora's {lora.gradients} and {lora.optimizer}, not {qlora.gradients} and {qlora.optimizer}"
    )
    assert qlora.total_parameters == lora.total_parameters, (
        f"{lora.total_parameters}, not {qlora.total_parameters}: a weight in 4 bits is one too"
    )


def test_lora_options_reach_the_layers():
    def lora(**options):
        return simulate(BASE, "lora", B, T, dtype="float32", **options)

    assert lora(r=4).trainable_parameters * 2 == lora(r=8).trainable_parameters, "rank 8 trains twice as much as rank 4"
    everywhere = lora(target_modules="all-linear")
    each_layer = 8 * (2 * (192 + 192) + 2 * (192 + 64) + 3 * (192 + 512))  # r (in + out): q o, k v, the MLP's three
    assert everywhere.trainable_parameters == BASE.num_hidden_layers * each_layer, (
        f"{BASE.num_hidden_layers * each_layer}, not {everywhere.trainable_parameters}"
    )
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
    assert report.total_parameters == report.trainable_parameters == 6_738_415_616, (
        f"6,738,415,616 in all, not {report.total_parameters}"
    )
    assert report.weights == report.gradients == 2 * 6_738_415_616, (
        f"{2 * 6738415616} bytes, not {report.weights} and {report.gradients}"
    )  # 12.55 GiB in bfloat16
    in_gib = [size / 2**30 for size in report.as_dict().values()]
    expected = [12.55, 12.55, 25.10, 12.24, 50.22]  # as the README's table says
    assert in_gib == pytest.approx(expected, rel=0.01), f"GiB of each kind and the peak: {expected}, not {in_gib}"
    assert 4 * report.weights < report.peak < 5 * report.weights, f"peak {report.peak / 2**30:.2f} GiB"


def test_lora_on_a_slice_of_seventy_billion():
    """Four of 80 layers at full width, batch 2: the shapes are real, the test is quick."""
    config = GPTConfig.preset("llama-2-70b", num_hidden_layers=4)
    report = simulate(config, "lora", batch_size=2, sequence_length=4096)
    assert report.predicted["weights"] == report.weights, (
        f"weights: formula {report.predicted['weights']}, simulated {report.weights}"
    )
    assert report.trainable_parameters == 4 * 8 * (8192 + 8192 + 8192 + 1024), (
        f"not {report.trainable_parameters}"
    )  # r (in + out) of q and v, each layer
    assert report.peak > report.weights + report.activations


def test_table_says_what_was_measured():
    table = simulate(BASE, "lora", 2, 32).table()
    for word in ("LoRA r=8 on q_proj, v_proj", "batch 2 x 32", "trainable params: ", "peak", "formula", "MiB", *KINDS):
        assert word in table, f"{word!r} is missing in\n{table}"


def test_the_table_gives_each_number_its_own_column():
    """Of a report made by hand, in which no two numbers are alike."""
    kib = 2**10
    report = MemoryReport(
        title="A title",
        trainable_parameters=125,
        total_parameters=10_000,
        weights=2 * kib,
        gradients=3 * kib,
        optimizer=4 * kib,
        activations=5 * kib,
        peak=45_000_000_000,
        at_peak=Bytes(6 * kib, 7 * kib, 8 * kib, 9 * kib),
        predicted={"weights": 10 * kib, "gradients": 11 * kib, "optimizer": 12 * kib},
        weights_itemsize=2,
    )
    expected = [
        "A title",
        "trainable params: 125 || all params: 10,000 || trainable%: 1.2500",
        "",
        "bytes of tensors formula simulated at the peak",
        "weights 10.00 KiB 2.00 KiB 6.00 KiB",
        "gradients 11.00 KiB 3.00 KiB 7.00 KiB",
        "optimizer 12.00 KiB 4.00 KiB 8.00 KiB",
        "activations - 5.00 KiB 9.00 KiB",
        "peak - 41.91 GiB 30.00 KiB",
        "",
        "1 GiB is 1024 MiB or 1,073,741,824 bytes; the peak is 45.00 GB of 10^9 bytes.",
    ]
    found = [" ".join(line.split()) for line in report.table().splitlines()]
    for line, right in zip(found, expected, strict=False):
        assert line == right, f"expected {right!r}, got {line!r}"
    assert len(found) == len(expected) + 1, found


@pytest.mark.parametrize(
    "options, title",
    [
        (dict(config="base", method="full"), "base, full fine-tuning, batch 1 x 8 tokens, bfloat16 weights"),
        (
            dict(method="lora", batch_size=2, dtype="float32", autocast=True, gradient_checkpointing=True, r=3),
            "GPT, LoRA r=3 on q_proj, v_proj, batch 2 x 8 tokens, float32 weights, autocast, checkpointing",
        ),
        (
            dict(method="qlora", target_modules="all-linear", quantization=Quantization("fp4")),
            "GPT, QLoRA r=8 on all-linear, batch 1 x 8 tokens, fp4 linears, rest bfloat16",
        ),
        (dict(counted_tokens=2), "GPT, full fine-tuning, batch 1 x 8 tokens (2 counted), bfloat16 weights"),
    ],
)
def test_the_title_says_what_was_simulated(options, title):
    found = simulate(**{"config": BASE, "sequence_length": 8, **options}).title
    assert found == title, f"expected {title!r}, got {found!r}"


def test_the_formula_of_4_bits_is_what_a_layer_stores():
    """A head of its own, biases, an odd number of scales: the formula of 4 bits against what a layer stores."""
    config = GPTConfig(64, 40, 56, 1, 4, 2, max_position_embeddings=16, attention_bias=True, mlp_bias=True)
    for quantization in (Quantization("nf4", 64, True), Quantization("int4", 32, False), Quantization("fp4", 4096)):
        report = simulate(config, "qlora", 1, 8, quantization=quantization, r=3)
        off = report.weights - report.predicted["weights"]
        assert off == 0, f"{quantization}: formula {report.predicted['weights']} bytes of weights, off by {off}"
        layers = quantized_layers(quantize_model(GPT(config), quantization)).values()
        real, found = sum(layer.quantized.nbytes for layer in layers), sum(map(bytes_in_4_bits, layers))
        assert found == real, f"{quantization}: the linears are {real} bytes, the formula says {found}"


def test_as_dict_has_the_names_of_results_json():
    assert list(simulate(BASE, "lora", 1, 8).as_dict()) == ["weights", "gradients", "optimizer", "activations", "peak"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(config="llama-9"), "unknown preset"),
        (dict(method="magic"), "unknown method 'magic'"),
        (dict(dtype="int3"), "unknown dtype 'int3'"),
        (dict(sequence_length=513), "513.*1 to 512"),
        (dict(sequence_length=0), "sequence_length is 0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(counted_tokens=16), "counted_tokens is 16; it must be a whole number from 0 to 15"),
        (dict(counted_tokens=-1), "counted_tokens is -1"),
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


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_dpo_keeps_no_second_model(method):
    """Its pairs are twice the rows; the reference, without gradients, adds next to nothing to the peak."""
    more = dict(sequence_length=64, target_modules="all-linear")
    pairs = simulate(BASE, method, 2, objective="dpo", **more)
    rows = simulate(BASE, method, 4, **more)
    for kind in ("weights", "gradients", "optimizer"):
        found, expected = getattr(pairs, kind), getattr(rows, kind)
        assert found == expected, f"{kind} of DPO: those of cross entropy, {expected} bytes, not {found}"
    assert rows.peak <= pairs.peak < 1.01 * rows.peak, (
        f"{pairs.peak} bytes of 2 pairs at the peak, {rows.peak} of 4 rows"
    )
    with pytest.raises(ValueError, match="unknown objective 'distill'; known: sft, dpo"):
        simulate(BASE, method, objective="distill")
