"""Adapters of one base made into one, against the full matrices and against loops. A and B are random.

Numbers are float64 where they are compared closely, so that what remains is a wrong formula and not rounding.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.adapters.adapter import Adapter, apply_adapter, extract_adapter
from minilora.adapters.combine import concatenate, dare, ties, truncate
from minilora.adapters.inject import apply_lora, lora_layers
from minilora.config import LoRAConfig
from minilora.model import GPT, GPTConfig
from minilora.storage.adapters import load_adapter, save_adapter

IDS = torch.arange(24).view(2, 12)
CONFIGS = [  # other targets, ranks and scalings; v_proj is in all of them
    LoRAConfig(2, 3, target_modules=["q_proj", "v_proj"]),
    LoRAConfig(
        3,
        5,
        target_modules=["v_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"down_proj": 1, r"layers\.1\.self_attn\.v_proj": 4},
        alpha_pattern={"down_proj": 7},
    ),
    LoRAConfig(1, 1, target_modules="all-linear"),
]
WEIGHTS = [0.7, -1.3, 0.4]
OUT, IN = 5, 4  # of the single layer "0"


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return GPT(GPTConfig(vocab_size=32, max_position_embeddings=16, **shape)).to(dtype)


def make_adapted(config, seed, dtype=torch.float64):
    model, generator = apply_lora(make_model(dtype), config), torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_A, std=0.3, generator=generator)
        nn.init.normal_(layer.lora_B, std=0.3, generator=generator)
    return model


def make_adapters(dtype=torch.float64):
    return [extract_adapter(make_adapted(config, seed, dtype)) for seed, config in enumerate(CONFIGS)]


def expected_deltas(weights=WEIGHTS):
    """Σ w ΔW by layer, from what the LoRA layers themselves say."""
    total = {}
    for seed, (config, weight) in enumerate(zip(CONFIGS, weights, strict=True)):
        for name, layer in lora_layers(make_adapted(config, seed)):
            total[name] = total.get(name, 0) + weight * layer.delta_weight().detach()
    return total


def deltas_of(adapter):
    return {name: adapter.scaling(name) * adapter.B[name].double() @ A.double() for name, A in adapter.A.items()}


def logits(model):
    with torch.no_grad():
        return model(IDS)


def make_single(seed, r=2, alpha=3.0, out=OUT, in_=IN, dtype=torch.float64):
    """An adapter of one layer, "0", of nn.Sequential(nn.Linear(in_, out))."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((r, in_), (out, r)))
    return Adapter(LoRAConfig(r, alpha, target_modules=["0"]), {"0": A}, {"0": B})


def of_delta(delta):
    """An adapter whose ΔW is the given matrix."""
    delta = torch.tensor(delta, dtype=torch.float64)
    return Adapter(LoRAConfig(len(delta), len(delta), target_modules=["0"]), {"0": delta}, {"0": torch.eye(len(delta))})


def assert_close(got, expected, what, **tolerance):
    torch.testing.assert_close(got, expected, msg=lambda message: f"{what}: {message}", **tolerance)


def relative_error(full, approximation):
    return ((full - approximation).norm() / full.norm()).item()


METHODS = {
    "concatenate": lambda adapters, weights: concatenate(adapters, weights),
    "truncate": lambda adapters, weights: truncate(adapters, weights, 2)[0],
    "ties": lambda adapters, weights: ties(adapters, weights, 0.5, 2)[0],
    "dare": lambda adapters, weights: dare(adapters, weights, 0.5, 2)[0],
}
every_method = pytest.mark.parametrize("combine", METHODS.values(), ids=METHODS)


# The exact sum


@pytest.mark.parametrize("weights", [WEIGHTS, [1, 1, 1], [0.0, 2.0, -1.0]], ids=str)
def test_the_concatenation_is_the_weighted_sum_of_the_updates(weights):
    combined, expected = concatenate(make_adapters(), weights), expected_deltas(weights)
    got = deltas_of(combined)
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for name, delta in expected.items():
        assert_close(got[name], delta, name)


def test_a_model_with_the_concatenation_is_the_base_with_the_sum_in_its_weights():
    model = make_model()
    with torch.no_grad():
        for name, delta in expected_deltas().items():
            model.get_submodule(name).weight += delta
    expected, base = logits(model), logits(make_model())
    got = logits(apply_adapter(make_model(), concatenate(make_adapters(), WEIGHTS)))
    assert (expected - base).abs().max() > 0.1, "the adapters should change the logits"
    assert_close(got, expected, "logits")


def test_the_concatenation_has_the_sum_of_the_ranks_and_nothing_is_rounded():
    adapters = make_adapters(torch.float32)
    combined = concatenate(adapters, [1, 1, 1])
    parts = ["self_attn.v_proj", "mlp.down_proj", "mlp.up_proj"]
    ranks = [[len(combined.A[f"model.layers.{i}.{part}"]) for part in parts] for i in range(2)]
    assert ranks == [[2 + 3 + 1, 1 + 1, 1], [2 + 4 + 1, 1 + 1, 1]]
    name = "model.layers.1.self_attn.v_proj"
    assert torch.equal(combined.A[name], torch.cat([adapter.A[name] for adapter in adapters]))
    first = combined.B[name][:, :2].double() - adapters[0].scaling(name) * adapters[0].B[name].double()
    assert first.abs().max() < 1e-7, f"B is off by {first.abs().max():.1e}: s must be in it, rounded once"


@every_method
def test_the_config_describes_every_layer_and_scales_by_one(combine):
    combined = combine(make_adapters(), WEIGHTS)
    assert not combined.config.use_rslora and combined.config.target_modules == list(combined.A)
    model = apply_adapter(make_model(), combined)
    layers = dict(lora_layers(model))
    assert layers.keys() == combined.A.keys() == combined.B.keys()
    for name, layer in layers.items():
        assert combined.scaling(name) == layer.scaling == 1, f"{name} is scaled by {layer.scaling}"
        assert torch.equal(layer.lora_A, combined.A[name]) and torch.equal(layer.lora_B, combined.B[name]), name


def test_names_are_no_regular_expressions():
    """As an expression "m.b" is also "mxb", and as the end of a name also "c.m.b"."""
    model = nn.ModuleDict({"mxb": nn.Linear(6, 6), "c": nn.ModuleDict({"m": nn.ModuleDict({"b": nn.Linear(6, 6)})})})
    model["m"] = nn.ModuleDict({"b": nn.Linear(6, 6)})
    ranks = {"m.b": 3, "mxb": 2, "c.m.b": 2}
    targets = dict(target_modules=list(ranks), rank_pattern={"^m[.]b": 3})
    adapter = Adapter(
        LoRAConfig(2, 2, **targets),
        {name: torch.randn(r, 6) for name, r in ranks.items()},
        {name: torch.randn(6, r) for name, r in ranks.items()},
    )
    combined = concatenate([adapter], [1])
    assert {name: layer.r for name, layer in lora_layers(apply_adapter(model, combined))} == ranks
    assert {combined.scaling(name) for name in ranks} == {1}


@pytest.mark.parametrize("index", range(3))
def test_one_adapter_with_weight_1_is_that_adapter(index):
    adapter, config = make_adapters()[index], CONFIGS[index]
    expected = logits(make_adapted(config, index))
    results = {
        "concatenate": concatenate([adapter], [1]),
        "truncate": truncate([adapter], [1], 4)[0],
        "ties": ties([adapter], [1], 1.0, 4)[0],
        "dare": dare([adapter], [1], 1.0, 4)[0],
    }
    for method, combined in results.items():
        assert_close(logits(apply_adapter(make_model(), combined)), expected, method)
    plain = make_single(0, r=2, alpha=2.0)  # its scaling is 1 already
    assert torch.equal(concatenate([plain], [1]).B["0"], plain.B["0"])


@every_method
def test_a_combined_adapter_survives_the_disk(combine, tmp_path):
    model = apply_adapter(make_model(torch.float32), combine(make_adapters(torch.float32), WEIGHTS))
    save_adapter(model, tmp_path)
    loaded = load_adapter(make_model(torch.float32), tmp_path)
    assert loaded.lora_config == model.lora_config
    assert torch.equal(logits(loaded), logits(model))


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_results_are_in_the_adapters_dtype_but_never_half_and_inputs_stay(combine, dtype):
    adapters = make_adapters(torch.float32)
    for adapter in adapters:
        adapter.A, adapter.B = ({n: t.to(dtype) for n, t in part.items()} for part in (adapter.A, adapter.B))
    before = copy.deepcopy(adapters)
    combined = combine(adapters, WEIGHTS)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for part in (combined.A, combined.B) for tensor in part.values()} == {wanted}
    for adapter, old in zip(adapters, before, strict=True):
        assert adapter.config == old.config
        assert all(torch.equal(adapter.A[n], old.A[n]) and torch.equal(adapter.B[n], old.B[n]) for n in old.A)


# The best of rank r


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_error_of_a_truncation_is_that_of_the_singular_values_left_out(r):
    combined, errors = truncate(make_adapters(), WEIGHTS, r)
    got, lossy = deltas_of(combined), 0
    for name, full in expected_deltas().items():
        values = torch.linalg.svdvals(full)
        expected = (values[r:].norm() / values.norm()).item()
        assert errors[name] == pytest.approx(expected, rel=1e-9, abs=1e-12), f"{name}: reported"
        assert relative_error(full, got[name]) == pytest.approx(expected, rel=1e-9, abs=1e-12), f"{name}: true"
        assert len(combined.A[name]) <= r, f"{name} has rank {len(combined.A[name])}"
        lossy += expected > 0.01
    assert errors.keys() == got.keys() and lossy >= 2, f"only {lossy} layers lost something: the test shows little"


def test_no_other_candidate_comes_closer():
    adapters, weights, r = [make_single(seed, r=3, alpha=seed + 1.0) for seed in range(3)], [1.0, -0.5, 2.0], 2
    full = sum(w * deltas_of(adapter)["0"] for w, adapter in zip(weights, adapters, strict=True))
    combined, _ = truncate(adapters, weights, r)
    best, generator = relative_error(full, deltas_of(combined)["0"]), torch.Generator().manual_seed(0)
    B, A = combined.B["0"], combined.A["0"]
    for size in (1e-3, 1e-2, 0.1, 1.0) * 25:
        noise = [size * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (B, A)]
        found = relative_error(full, (B + noise[0]) @ (A + noise[1]))
        assert found > best, f"a step of {size} comes to {found:.6f}, closer than {best:.6f}"
    for adapter in adapters:  # the best in the row space of one adapter, or in its column space
        row, column = torch.linalg.qr(adapter.A["0"][:r].T).Q, torch.linalg.qr(adapter.B["0"][:, :r]).Q
        assert relative_error(full, full @ row @ row.T) > best and relative_error(full, column @ column.T @ full) > best


def test_a_rank_above_the_sums_own_keeps_all_of_it_and_no_more():
    combined, errors = truncate(make_adapters(), WEIGHTS, 100)
    ranks = {name: len(A) for name, A in combined.A.items()}
    assert ranks["model.layers.1.self_attn.v_proj"] == 2 + 4 + 1 and ranks["model.layers.0.mlp.up_proj"] == 1
    for name, delta in expected_deltas().items():
        assert_close(deltas_of(combined)[name], delta, name)
        assert errors[name] == 0, f"{name}: {errors[name]}"
    many, errors = truncate([make_single(seed, r=3) for seed in range(4)], [1, 1, 1, 1], 100)
    assert len(many.A["0"]) == IN and errors["0"] == 0, "12 columns, but a 5 x 4 matrix has rank 4 at most"


@pytest.mark.parametrize("pick, weights", [([0], [0.0]), ([0, 0], [1, -1]), ([1, 1, 1], [0.1, 0.2, -0.3])], ids=str)
def test_adapters_that_cancel_leave_zeros_and_an_error_of_zero(pick, weights):
    adapters = make_adapters()
    combined, errors = truncate([adapters[i] for i in pick], weights, 1)
    assert set(errors.values()) == {0.0}, errors
    assert not any(B.any() for B in combined.B.values()), "rounding was taken for a part of the sum"
    for method in (ties, dare):
        zeros, errors = method([adapters[0]], [0.0], 0.5, 1)
        assert set(errors.values()) == {0.0} and not any(B.any() for B in zeros.B.values())


def test_truncation_computes_in_float64():
    adapters = [make_single(seed, r=3, out=30, in_=20, dtype=torch.float32) for seed in range(3)]
    adapters.append(copy.deepcopy(adapters[0]))
    weights = [1.0, 1e-3, 1e-3, -1.0]  # the large part cancels
    full = sum(w * deltas_of(adapter)["0"] for w, adapter in zip(weights, adapters, strict=True))
    values = torch.linalg.svdvals(full)
    combined, errors = truncate(adapters, weights, 4)
    assert errors["0"] == pytest.approx((values[4:].norm() / values.norm()).item(), rel=1e-9)
    assert combined.A["0"].dtype == torch.float32
    assert relative_error(full, deltas_of(combined)["0"]) == pytest.approx(errors["0"], rel=1e-6)


def test_truncation_never_forms_the_sum():
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t))
            return result

    with Watch():
        truncate([make_single(seed, out=60, in_=50) for seed in range(2)], [1, 1], 2)
    assert max(sizes) <= 4 * 60, f"an array of {max(sizes)} numbers was made; the factors have 240"


# TIES


def ties_by_loops(adapters, weights, density):
    deltas = [(w * deltas_of(adapter)["0"]).tolist() for w, adapter in zip(weights, adapters, strict=True)]
    for delta in deltas:
        places = sorted(
            ((i, j) for i in range(OUT) for j in range(IN)), key=lambda place: -abs(delta[place[0]][place[1]])
        )
        for i, j in places[round(density * OUT * IN) :]:
            delta[i][j] = 0.0
    result = torch.zeros(OUT, IN, dtype=torch.float64)
    for i in range(OUT):
        for j in range(IN):
            entries = [delta[i][j] for delta in deltas if delta[i][j]]
            sign = math.copysign(1, sum(entries))
            agreeing = [entry for entry in entries if entry * sign > 0]
            result[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, -2.0, 1.5], [1, 0, 1]], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.29, 0.5, 1.0])
def test_ties_equals_the_loops(density, weights):
    adapters = [make_single(seed) for seed in range(3)]
    combined, errors = ties(adapters, weights, density, IN)
    assert_close(deltas_of(combined)["0"], ties_by_loops(adapters, weights, density), "trimmed, elected, averaged")
    assert errors["0"] < 1e-12, f"rank {IN} loses nothing of a {OUT} x {IN} matrix, not {errors['0']}"


def test_ties_by_hand():
    first, second = of_delta([[4.0, 1.0, -3.0, 2.0]]), of_delta([[2.0, 8.0, 1.0, -2.0]])
    cases = {
        # both sum to + in the first, so (4 + 2)/2; -3 outweighs 1; 2 and -2 elect nobody
        (1, 1, 1.0): [3.0, 4.5, -3.0, 0.0],
        # the election is by weight: 4 - 6, 1 - 24, -3 - 3, 2 + 6
        (1, -3, 1.0): [-6.0, -24.0, -3.0, 4.0],
        # a quarter of four entries is one: 4 stays of the first, 8 of the second
        (1, 1, 0.25): [4.0, 8.0, 0.0, 0.0],
        # density so small that nothing would stay: the largest does
        (2, 1, 0.01): [8.0, 8.0, 0.0, 0.0],
    }
    for (w1, w2, density), expected in cases.items():
        got = deltas_of(ties([first, second], [w1, w2], density, 1)[0])["0"]
        wanted = torch.tensor([expected], dtype=torch.float64)
        assert_close(got, wanted, f"weights {w1}, {w2}, density {density}")


def test_an_adapter_that_lacks_a_layer_does_not_thin_out_the_mean():
    adapters = make_adapters()
    combined, _ = ties(adapters, [1, 1, 1], 1.0, 16)
    q, name = expected_deltas([1, 0, 0]), "model.layers.0.mlp.up_proj"  # in the third only
    assert_close(deltas_of(combined)[name], expected_deltas([0, 0, 1])[name], name)
    name = "model.layers.0.self_attn.q_proj"  # in the first and the third
    both = torch.stack([q[name], expected_deltas([0, 0, 1])[name]])
    agree = both.sign() == both.sum(0).sign()
    assert_close(deltas_of(combined)[name], (both * agree).sum(0) / agree.sum(0), name)


# DARE


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_dare_keeps_entries_scaled_up_or_drops_them(density):
    adapter = make_single(0, out=40, in_=30)
    full, combined = deltas_of(adapter)["0"], dare([adapter], [0.5], density, 30)[0]
    got = deltas_of(combined)["0"]
    kept = got.abs() > 1e-9
    assert_close(got, torch.where(kept, 0.5 * full / density, 0.0), "what stays, over the density")
    share, spread = kept.double().mean().item(), math.sqrt(density * (1 - density) / kept.numel())
    assert abs(share - density) < 4 * spread, f"{share:.3f} of the entries stayed, {density} expected"


def test_dare_draws_for_every_adapter_and_layer_anew():
    one = make_single(0, out=20, in_=20)
    got = deltas_of(dare([one, one], [1, 1], 0.5, 20)[0])["0"]
    quotient = (got / deltas_of(one)["0"]).round(decimals=6)
    counts = [(quotient == value).sum().item() for value in (0, 2, 4)]
    assert sum(counts) == 400 and min(counts) > 60, f"{counts} entries stayed in none, one and both of two adapters"
    two = Adapter(
        LoRAConfig(2, 3, target_modules=["0", "1"]), {n: one.A["0"] for n in "01"}, {n: one.B["0"] for n in "01"}
    )
    both = deltas_of(dare([two], [1], 0.5, 20)[0])
    assert ((both["0"].abs() > 1e-9) != (both["1"].abs() > 1e-9)).sum() > 100, "both layers dropped the same entries"


def test_dare_is_the_sum_on_average():
    adapters, weights, density, seeds = [make_single(seed) for seed in range(2)], [1.0, -0.5], 0.5, 400
    deltas = [w * deltas_of(adapter)["0"] for w, adapter in zip(weights, adapters, strict=True)]
    mean = sum(deltas_of(dare(adapters, weights, density, IN, seed)[0])["0"] for seed in range(seeds)) / seeds
    # An entry x becomes x/density or 0, of variance x²(1 - density)/density.
    spread = (sum(delta**2 for delta in deltas) * (1 - density) / density / seeds).sqrt()
    worst = ((mean - sum(deltas)).abs() / spread).max().item()
    assert worst < 4.5, f"the mean of {seeds} seeds is {worst:.1f} standard deviations off"
    assert relative_error(sum(deltas), mean) < 0.1


def test_dare_depends_on_its_seed_and_on_nothing_else():
    adapters = make_adapters()
    first = dare(adapters, WEIGHTS, 0.5, 2, seed=3)[0]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = (dare(adapters, WEIGHTS, 0.5, 2, seed=seed)[0] for seed in (3, 4))
    assert torch.equal(torch.get_rng_state(), state), "torch's own random numbers were used"
    for name in first.A:
        assert torch.equal(first.A[name], again.A[name]) and torch.equal(first.B[name], again.B[name]), name
        assert not torch.allclose(deltas_of(first)[name], deltas_of(other)[name]), name


# What both report


@pytest.mark.parametrize("method", [ties, dare])
def test_the_reported_error_is_measured_against_the_methods_own_full_result(method):
    adapters = make_adapters()
    combined, errors = method(adapters, WEIGHTS, 0.4, 3)
    whole, none_lost = method(adapters, WEIGHTS, 0.4, 16)
    assert max(none_lost.values()) < 1e-12, none_lost
    got = deltas_of(combined)
    for name, full in deltas_of(whole).items():
        values = torch.linalg.svdvals(full)
        assert errors[name] == pytest.approx(relative_error(full, got[name]), rel=1e-6), name
        assert errors[name] == pytest.approx((values[3:].norm() / values.norm()).item(), rel=1e-6), name
        assert errors[name] > 0.01, f"{name}: sparse entries have no low rank, and only {errors[name]} was lost"


# Bad input


@every_method
def test_bad_adapters_and_weights_are_refused(combine):
    one, wide = make_single(0), make_single(1, in_=7)
    with pytest.raises(ValueError, match="there are no adapters"):
        combine([], [])
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        combine([one, one], [1.0])
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"weights are .*{weight}.* finite"):
            combine([one, one], [1.0, weight])
    with pytest.raises(ValueError, match="^0 is of 4 to 5 features in one adapter and of 7 to 5 in another"):
        combine([one, wide], [1, 1])
    with pytest.raises(ValueError, match="^0 is of 4 to 5 .* of 4 to 6"):
        combine([one, make_single(1, out=6)], [1, 1])


@pytest.mark.parametrize("r", [0, -1, 2.0])
def test_a_rank_below_one_is_refused(r):
    for call in (lambda: truncate([make_single(0)], [1], r), lambda: ties([make_single(0)], [1], 0.5, r)):
        with pytest.raises(ValueError, match=f"r is {r}"):
            call()
    with pytest.raises(ValueError, match=f"r is {r}"):
        dare([make_single(0)], [1], 0.5, r)


@pytest.mark.parametrize("density", [0, -0.5, 1.01, math.nan])
@pytest.mark.parametrize("method", [ties, dare])
def test_a_density_that_is_no_share_is_refused(method, density):
    with pytest.raises(ValueError, match=f"density is {density}"):
        method([make_single(0)], [1], density, 2)
