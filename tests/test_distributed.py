"""Several processes train what one trains: the same loss and the same weights, and what they send is counted.

All processes of this file are started once, and each runs every case; the tests look at what they have written.
"""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minilora import distributed
from minilora.__main__ import build_parser, main
from minilora.adapters.inject import apply_lora, lora_layers
from minilora.adapters.prompts import PrefixTuning
from minilora.config import LoRAConfig
from minilora.experiments.devices import on_devices, rows_of_each
from minilora.experiments.run import BASE, open_base
from minilora.experiments.simulate import simulate
from minilora.experiments.wire import Wire, bytes_of_a_step
from minilora.linear4bit import quantize_model
from minilora.model import GPT, GPTConfig
from minilora.objectives import Preference
from minilora.storage.adapters import load_adapter
from minilora.text.batches import Batches
from minilora.train import make_optimizer, train, training_step
from minilora.train_settings import CROSS_ENTROPY, IGNORE, NonFiniteError, TrainConfig

CONFIG = GPTConfig(64, 32, 64, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
LORA = LoRAConfig(r=2, lora_alpha=4, target_modules="all-linear")
PLAN = TrainConfig(steps=3, batch_size=5, learning_rate=1e-2, seed=3, max_grad_norm=0.5)  # 5 rows: shares of 3 and 2
METHODS = {
    "full": lambda model: model.requires_grad_(True),
    "lora": lambda model: randomly(apply_lora(model, LORA)),
    "dora": lambda model: randomly(apply_lora(model, replace(LORA, use_dora=True))),
    "qlora": lambda model: randomly(apply_lora(quantize_model(model), LORA)),
    "prefix": lambda model: PrefixTuning(model, 3, [1, 2]),
}
PLANS = {
    "two pieces": replace(PLAN, accumulation_steps=2, batch_size=6),
    "like lengths": replace(PLAN, group_by_length=True),
    "checkpointed": replace(PLAN, gradient_checkpointing=True),
    "no clipping": replace(PLAN, max_grad_norm=1e9),
}
UNLIKE = (3, 9)  # rows of a batch in 3 pieces: of two processes one cannot make as many as the other, or would not


def randomly(model):
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def built(method: str):
    torch.manual_seed(0)
    return METHODS[method](GPT(CONFIG).double())


def rows(pairs: bool = False) -> Batches:
    """Rows, or pairs of rows, of different lengths."""
    ids = torch.randint(64, (10, *[2] * pairs, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    lengths = torch.arange(len(ids)) % 4 + 7
    return Batches(ids, labels.where(torch.arange(12) < lengths.view(-1, *[1] * (labels.ndim - 1)), IGNORE))


def silent_rows() -> Batches:
    data = rows()
    data.labels[:, 1:] = IGNORE
    data.labels[0, 3:5] = data.input_ids[0, 3:5]  # two tokens of one row count, in all the data
    return data


def trained(method: str, plan=PLAN, data=None, objective=CROSS_ENTROPY, sharded=False, **more):
    model = built(method)
    if sharded:
        distributed.shard(model, model.model.layers)
    history = train(model, data or rows(), plan, rows(data is not None and data.input_ids.ndim == 3), progress=False,
                    objective=objective, **more)  # fmt: skip
    distributed.unshard(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return weights, history


def result(weights, history):
    return {"weights": weights, "losses": [loss for _, loss in history.train_loss + history.validation_loss]}


def cases(folder: Path) -> dict:
    """What every process computes, by the name of the case."""
    found = {f"method {name}": result(*trained(name)) for name in METHODS}
    found |= {f"plan {name}": result(*trained("lora", plan)) for name, plan in PLANS.items()}
    found["few tokens"] = result(*trained("lora", data=silent_rows()))
    found["pairs"] = result(*trained("lora", data=rows(pairs=True), objective=Preference()))
    for name in ("full", "lora", "qlora"):
        found[f"sharded {name}"] = result(*trained(name, sharded=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "BUCKET", 100)  # several messages a step, some of one gradient alone
        found["small buckets"] = result(*trained("lora"))
    for size in UNLIKE:
        plan = replace(PLAN, batch_size=size, accumulation_steps=3)
        found[f"sharded pieces {size}"] = result(*trained("lora", plan, sharded=True))
    return found


def in_company(folder: Path) -> dict:
    """What only several processes can say."""
    rank, found = distributed.rank(), {}
    for name in ("full", "lora"):
        for sharded in (False, True):
            model = built(name)
            if sharded:
                distributed.shard(model, model.model.layers)
            optimizer, data = make_optimizer(model, PLAN), rows()
            for _ in range(2):  # the first step gathers what stays whole from then on
                with Wire() as wire:
                    training_step(model, optimizer, data.input_ids[:4], data.labels[:4], PLAN)
            found[f"wire {name} {sharded}"] = dict(wire.sent)
    own = folder / f"state-{rank}.safetensors"
    trained("lora", replace(PLAN, save_every=1), state_path=own)
    found["wrote"] = own.exists()
    dropping = replace(LORA, lora_dropout=0.5)
    METHODS["dropping"] = lambda model: randomly(apply_lora(model, dropping))
    state = folder / "state.safetensors"
    whole, _ = trained("dropping", replace(PLAN, steps=4, save_every=2), state_path=folder / "whole.safetensors")
    try:
        trained("dropping", replace(PLAN, steps=4, save_every=2), state_path=state, after_step=stop_at(3))
    except Stop:
        pass
    distributed.wait_for_all()
    again, _ = trained("dropping", replace(PLAN, steps=4, save_every=2), state_path=state, resume=True)
    found["resumed"] = max((whole[name] - again[name]).abs().max().item() for name in whole)
    lonely = torch.nn.Parameter(torch.zeros(2))
    lonely.grad = torch.ones(2) if rank == 0 else None
    distributed.sum_gradients([lonely])
    found["lonely"] = lonely.grad.tolist()
    distributed.own_randomness(0, 7)
    found["drawn"] = torch.rand(3).tolist()
    wild = built("lora")
    with torch.no_grad():
        next(layer for _, layer in lora_layers(wild)).lora_B.fill_(torch.inf if rank == 1 else 0)
    try:
        train(wild, rows(), PLAN, progress=False)
    except NonFiniteError as error:
        found["wild"] = str(error)
    try:
        distributed.share(torch.zeros(1, 3))
    except ValueError as error:
        found["too few"] = str(error)
    return found


class Stop(Exception):
    pass


def stop_at(step: int):
    def after_step(done: int, optimizer):
        if done == step:
            raise Stop

    return after_step


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with distributed.processes("cpu"):
        found = {"cases": cases(folder), "company": in_company(folder)}
        torch.save(found, folder / f"process-{distributed.rank()}.pt")
    sys.exit()


def torchrun(count: int, *command: str, **settings) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*run, *command], capture_output=True, text=True, env=environment, timeout=300, **settings)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(2, __file__, str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"process-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return cases(tmp_path_factory.mktemp("alone"))


NAMES = (
    [f"method {name}" for name in METHODS]
    + [f"plan {name}" for name in PLANS]
    + ["few tokens", "pairs", "small buckets"]
)
NAMES += ["sharded full", "sharded lora", "sharded qlora", *(f"sharded pieces {size}" for size in UNLIKE)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_trains(name, two, alone):
    for rank, found in enumerate(two[1]):
        if rank == 1 and name.startswith("sharded"):
            continue  # the pieces are put together in the first process
        there, here = found["cases"][name], alone[name]
        assert there["losses"] == pytest.approx(here["losses"], rel=1e-9), f"the losses of process {rank}"
        assert there["weights"].keys() == here["weights"].keys()
        for key, weight in here["weights"].items():
            off = (there["weights"][key] - weight).abs().max().item()
            limit = 1e-6 if weight.dtype == torch.float32 else 1e-9  # adapters on 4 bits are float32
            assert off < limit, f"process {rank}: {key} is off by {off:.1e}"


def test_a_resumed_run_with_dropout_is_the_run_that_was_not_killed(two):
    folder, found = two
    assert [each["company"]["resumed"] for each in found] == [0, 0]
    first, second = (each["company"]["drawn"] for each in found)
    assert first != second, "each process draws masks of its own"


def test_a_gradient_that_one_process_does_not_have_counts_as_zero_there(two):
    assert [each["company"]["lonely"] for each in two[1]] == [[1, 1], [1, 1]]


def test_a_model_that_was_sharded_is_whole_in_the_first_process_alone(two):
    weights = two[1][1]["cases"]["sharded full"]["weights"]
    assert all(len(weight) == 0 for weight in weights.values()), "the second one needs memory for its pieces alone"


def test_only_the_first_process_writes(two):
    assert [each["company"]["wrote"] for each in two[1]] == [True, False]


def test_what_is_not_finite_in_one_process_ends_all_alike(two):
    first, second = (each["company"]["wild"] for each in two[1])
    assert first == second and "at step 0 of 3 the loss is nan" in first


def test_each_process_needs_a_row(two):
    wanted = "a batch of 1 rows cannot be shared by 2 processes; give each a row"
    assert [each["company"]["too few"] for each in two[1]] == [wanted, wanted]


def sizes(method: str) -> tuple[int, int, int]:
    """Bytes of a model: trained, frozen, and of all that is in no block."""
    model = built(method)
    parts = [0, 0, 0]
    for name, parameter in model.named_parameters():
        parts[0 if parameter.requires_grad else 1] += parameter.nbytes
        parts[2] += parameter.nbytes * ("layers" not in name)
    return tuple(parts)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_sent_is_what_the_formula_says(method, sharded, two):
    trained, frozen, outside = sizes(method)
    formula = bytes_of_a_step(trained, frozen, outside, devices=2, sharded=sharded)
    for found in two[1]:
        sent = sum(found["company"][f"wire {method} {sharded}"].values())
        assert sent - formula in range(0, 33), f"sent {sent:,d}, by formula {formula:,d} and a count and a loss"


def test_alone_nothing_is_shared_summed_or_sent():
    batch = torch.arange(6).view(3, 2)
    assert distributed.world() == 1 and distributed.rank() == 0
    assert torch.equal(distributed.share(batch)[0], batch)
    loss = torch.tensor(2.0)
    assert distributed.total(loss) is loss and distributed.total(7) == 7
    model = built("lora")
    assert distributed.shard(model, model.model.layers) is model and distributed.unshard(model) is model
    assert next(distributed.shard(built("lora"), [], "meta").parameters()).device.type == "meta"
    before = torch.get_rng_state()
    distributed.own_randomness(3, 4)
    assert torch.equal(torch.get_rng_state(), before), "one process goes on drawing as it did"


# The command line


COMMAND = ["-m", "minilora", "finetune", "--task", "json", "--steps", "2", "--batch-size", "4", "--count", "4"]


def test_one_process_writes_and_speaks(tmp_path):
    done = torchrun(2, *COMMAND, "--out", str(tmp_path / "out"), "--shard")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trainable_parameters") == 1
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    model = load_adapter(open_base(BASE).load(), tmp_path / "out")  # the fingerprint is that of the whole base
    assert any(layer.lora_B.abs().max() > 0 for _, layer in lora_layers(model))


@pytest.mark.parametrize("said", ["Connection closed by peer", "Connection reset by peer", "Broken pipe"])
def test_a_process_that_is_gone_is_one_sentence(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    with pytest.raises(ConnectionError, match="another process has ended"), distributed.processes("cpu"):
        raise RuntimeError(f"[gloo/transport/tcp/pair.cc:553] Read error: {said}. GLHF!")
    with pytest.raises(RuntimeError, match="a fault of ours"), distributed.processes("cpu"):
        raise RuntimeError("a fault of ours")


def test_bad_input_is_refused_once(tmp_path, monkeypatch, capsys):
    done = torchrun(2, *COMMAND, "--out", str(tmp_path), "--batch-size", "1")  # refused by training, in all alike
    said = "error: a batch of 1 rows cannot be shared by 2 processes"
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and said in done.stderr, done.stderr
    for rank, spoken in (("0", True), ("1", False)):  # refused by the parser, which each process asks
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            build_parser().parse_args(["finetune", "--dropout", "7"])
        assert left.value.code == 2 and ("--dropout" in capsys.readouterr().err) is spoken


@pytest.mark.parametrize("arguments", [[], ["compare", "--steps", "2"], ["memory"], ["merge"]])
def test_a_verb_that_each_process_would_do_alone_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        main(arguments)
    name = arguments[0] if arguments else "compare"
    assert left.value.code == 2 and f"2 processes would each do all of {name}" in capsys.readouterr().err


# What is simulated


def report_of(method: str):
    lora = dict(r=2, target_modules="all-linear")
    return simulate(CONFIG, method, batch_size=1, sequence_length=16, dtype="float32", **lora)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_share_of_a_device_adds_up_to_the_whole(method):
    report = report_of(method)
    trained, frozen, outside = (part // 2 for part in sizes(method))  # the model of `sizes` is float64
    alone, two, many = (on_devices(report, CONFIG, n, sharded=True) for n in (1, 2, 64))
    data_parallel = on_devices(report, CONFIG, 2)
    assert (data_parallel.weights, data_parallel.gradients) == (report.weights, report.gradients)
    assert data_parallel.sent == bytes_of_a_step(trained, frozen, outside, 2) > 0 == on_devices(report, CONFIG, 1).sent
    cut = frozen or trained
    assert two.weights == (report.weights - cut) + cut // 2 + outside + 2 * ((cut - outside) // 2)
    assert many.weights < two.weights and many.activations == report.activations
    assert (many.optimizer < two.optimizer) == (method == "full"), "adapters are whole on every device"
    assert two.sent == bytes_of_a_step(trained, frozen, outside, 2, sharded=True)
    assert two.most == two.weights + two.gradients + two.optimizer + two.activations


def test_a_number_of_devices_out_of_range_is_refused():
    with pytest.raises(ValueError, match="devices is 0"):
        on_devices(report_of("lora"), CONFIG, 0)


def test_rows_are_those_of_the_busiest_device():
    assert [rows_of_each(8, devices) for devices in (1, 3, 8, 16)] == [8, 3, 1, 1]
