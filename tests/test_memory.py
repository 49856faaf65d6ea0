"""The memory meter, held against sums done by hand and against torch's own profiler."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from minilora.memory import KINDS, Bytes, MemoryMeter, format_bytes
from minilora.model import GPT, GPTConfig

MIB = 2**20


def floats(count: int) -> torch.Tensor:
    return torch.ones(count)  # 4 bytes each


def meter_of_nothing(**options) -> MemoryMeter:
    return MemoryMeter(nn.Module(), **options)


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(256, 64, 176, 3, 4, 2, max_position_embeddings=64, tie_word_embeddings=True))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor):
    logits = model(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_peak_of_a_known_sequence_is_exact_to_the_byte():
    meter = meter_of_nothing()
    with meter:
        a = floats(100)  # 400
        b = floats(1000)  # 4400, the peak
        del b
        c = floats(500)  # 2400
        del a
    assert meter.peak == Bytes(activations=4400), f"expected a peak of 4400 bytes, got {meter.peak}"
    assert meter.now == Bytes(activations=2000), f"expected 2000 bytes alive, got {meter.now}"
    assert [live.total for live in meter.timeline()] == [400, 4400, 400, 2400, 2000], (
        f"400, 4400, 400, 2400, 2000, not {[live.total for live in meter.timeline()]}"
    )
    del c
    assert meter.now.total == 0, "a tensor that dies after the block must be seen to die"


def test_views_are_counted_once():
    meter = meter_of_nothing()
    with meter:
        x = torch.ones(10, 20)
        views = [x.T, x[0], x.view(200), x.unsqueeze(0).expand(5, 10, 20), x.detach()]
    assert meter.peak.total == 800, f"one storage of 800 bytes, counted as {meter.peak.total}"
    del x
    assert meter.now.total == 800, "a storage lives as long as any view of it"
    del views
    assert meter.now.total == 0, f"all are dead, and {meter.now.total} bytes are counted"


def test_in_place_operations_add_nothing():
    meter = meter_of_nothing()
    with meter:
        x = floats(100)
        x.add_(1).mul_(2)
        torch.add(x, 1, out=x)
    assert meter.peak.total == 400, f"in-place operations made {meter.peak.total - 400} bytes"


def test_a_storage_resized_in_place_counts_its_new_size():
    meter = meter_of_nothing()
    with meter:
        x = floats(100)
        x.resize_(300)
    assert meter.now.total == 1200, f"expected 1200 bytes after resize_, got {meter.now.total}"


def test_a_tensor_made_before_is_counted_once_it_is_used():
    x = floats(100)
    meter = meter_of_nothing()
    with meter:
        x.sum()
    assert meter.now.total == 400, f"one tensor of 400 bytes was used, and {meter.now.total} are counted"


def test_block_rounds_each_storage_up():
    meter = meter_of_nothing(block=512)
    with meter:
        kept = floats(1), floats(128), floats(129)  # 4, 512 and 516 bytes
    assert meter.now.total == 512 + 512 + 1024, f"got {meter.now.total}"
    del kept
    with pytest.raises(ValueError, match="block"):
        meter_of_nothing(block=0)


def test_linear_layer_by_hand():
    """y = W x with W (20, 10), x (3, 10): each kind in closed form."""
    layer = nn.Linear(10, 20, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    meter = MemoryMeter(layer)
    with meter:
        layer(torch.ones(3, 10)).sum().backward()
        assert meter.now == Bytes(weights=800, gradients=800), f"after backward: {meter.now}"
        optimizer.step()
        assert meter.now == Bytes(weights=800, gradients=800, optimizer=2 * 800 + 4), f"after the step: {meter.now}"
        optimizer.zero_grad()
    assert meter.now == Bytes(weights=800, optimizer=2 * 800 + 4), f"after zero_grad: {meter.now}"
    # Largest of all inside AdamW's step: two temporaries of the weight's size at most, beside W, its gradient and state
    assert meter.highest["gradients"] == 800 and meter.highest["optimizer"] == 1604, (
        f"gradients 800, optimizer 1604, not {meter.highest}"
    )
    assert meter.highest["peak"] <= 800 + 800 + 1604 + 2 * 800, (
        f"at most {800 + 800 + 1604 + 2 * 800}, not {meter.highest['peak']}"
    )


def test_gradient_and_state_count_under_their_names_from_the_first_byte():
    """At the peak inside backward, a gradient not yet accumulated is a gradient all the same."""
    layer = nn.Linear(1000, 1000, bias=False)
    meter = MemoryMeter(layer)
    with meter:
        layer(torch.ones(1, 1000)).sum().backward()
    assert meter.peak.gradients == 4_000_000, f"split at the peak: {meter.peak}"
    assert meter.highest["activations"] < 20_000, f"{meter.highest['activations']} bytes of activations"


def test_accumulated_gradients_stay_one_tensor_each():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    meter = MemoryMeter(model)
    with meter:
        for _ in range(3):
            model(torch.ones(2, 30)).sum().backward()
    assert meter.now.gradients == size, f"expected {size} bytes of gradients, got {meter.now.gradients}"


def test_frozen_parameters_have_no_gradient_and_no_state():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    model[0].requires_grad_(False)
    model.register_buffer("table", floats(1000))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    meter = MemoryMeter(model, optimizer)
    with meter:
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
    trained = 4 * (64 * 8 + 8)
    assert meter.now.weights == 4 * (64 * 64 + 64) + trained + 4000, (
        f"{4 * (64 * 64 + 64) + trained + 4000} bytes of weights, not {meter.now}"
    )
    assert meter.now.gradients == trained, f"{trained} bytes of gradients, not {meter.now.gradients}"
    assert meter.now.optimizer == 2 * trained + 2 * 4, (
        f"{2 * trained + 2 * 4} bytes of state, not {meter.now.optimizer}"
    )


def test_state_and_gradients_from_before_the_block_are_known():
    layer = nn.Linear(10, 20)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3, 10)).sum().backward()
    optimizer.step()
    meter = MemoryMeter(layer, optimizer)
    with meter:
        pass
    assert meter.now == Bytes(weights=880, gradients=880, optimizer=2 * 880 + 2 * 4), (
        f"weights 880, gradients 880, state 1768, not {meter.now}"
    )


def test_tied_weights_are_counted_once():
    model = small_gpt()
    with (meter := MemoryMeter(model)):
        pass
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert meter.now.weights == 4 * sum(parameter.numel() for parameter in model.parameters()), (
        f"each weight once, not {meter.now}"
    )


def test_what_autograd_saves_is_alive_and_checkpointing_frees_it():
    def chain(x):
        for _ in range(6):
            x = x.sin()  # saves its input
        return x

    size = 4 * 1000
    x = floats(1000).requires_grad_()
    with (saved := meter_of_nothing()):
        y = chain(x)
    assert saved.now.total == 7 * size, f"x, five saved inputs and y: {saved.now.total / size} tensors"
    del y
    with (recomputed := meter_of_nothing()):
        y = checkpoint(chain, x, use_reentrant=False)
        assert recomputed.now.activations <= 2 * size + 100, "under checkpointing only x and y live after forward"
        y.sum().backward()
    assert recomputed.peak.total >= 7 * size, "the recomputation inside backward must be seen"


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())  # a hidden copy
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_inside_of_an_autograd_function_is_seen():
    x = floats(1000).requires_grad_()
    with (meter := meter_of_nothing()):
        y = Square.apply(x)
    assert meter.now.total == 3 * 4000, f"x, the saved copy and y, got {meter.now.total}"
    del y
    assert meter.now.total == 4000, "the saved copy dies with the graph"


def test_every_block_starts_a_new_diary():
    meter = meter_of_nothing()
    with meter:
        floats(10_000)
    with meter:
        kept = floats(10)
    assert meter.peak.total == 40, f"the first block's peak leaked into the second: {meter.peak}"
    del kept


def test_nothing_is_written_after_the_block():
    layer = nn.Linear(10, 20)
    optimizer = torch.optim.AdamW(layer.parameters())
    with (meter := MemoryMeter(layer, optimizer)):
        pass
    layer(torch.ones(3, 10)).sum().backward()
    optimizer.step()
    assert meter.now == Bytes(weights=880), f"a hook of the meter outlived its block: {meter.now}"


def test_checkpointing_lowers_the_activations_of_a_model():
    peaks = {}
    for checkpointing in (False, True):
        model = small_gpt()
        model.model.gradient_checkpointing = checkpointing
        optimizer = torch.optim.AdamW(model.parameters())
        with (meter := MemoryMeter(model, optimizer)):
            step(model, optimizer, torch.zeros(4, 64, dtype=torch.long))
        peaks[checkpointing] = meter.highest["activations"]
    assert peaks[True] < 0.6 * peaks[False], f"activations {peaks[False]} without, {peaks[True]} with checkpointing"


def profiler_peak(run, path) -> int:
    """Largest number of bytes allocated since the start, from the profiler's own record of each malloc and free.

    A block that was there before and is freed inside would be missed, so `run` must free nothing it did not make.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # what torch 2.11 says of every profile
@pytest.mark.parametrize("checkpointing", [False, True])
def test_meter_and_profiler_agree_at_the_peak(tmp_path, checkpointing):
    model = small_gpt()
    model.model.gradient_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(8, 64, dtype=torch.long)
    step(model, optimizer, ids)  # the optimizer's state is there from here on
    with (meter := MemoryMeter(model, optimizer)):
        step(model, optimizer, ids)
    before = meter.now.weights + meter.now.optimizer + ids.nbytes  # what the profiler did not see being made
    expected = before + profiler_peak(lambda: step(model, optimizer, ids), tmp_path / "trace.json")
    error = meter.peak.total / expected - 1
    assert abs(error) < 0.02, f"meter {meter.peak.total}, profiler {expected}: off by {error:.2%}"


def test_report_names_every_kind():
    layer = nn.Linear(512, 512, bias=False)
    with (meter := MemoryMeter(layer)):
        layer(torch.ones(1, 512)).sum().backward()
    report = meter.report()
    assert all(kind in report for kind in KINDS) and "1.00 MiB" in report, report


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * MIB, 5 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "3.00 MiB",
        "5.00 GiB",
    ]
