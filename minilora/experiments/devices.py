"""A step on several devices, from the simulated step of one: what each device holds, and what it sends.

The rows of a batch are shared out, so what is simulated is the step on one device's rows. Data parallel, every device
holds all of it. Sharded over n devices (`distributed.shard`), S bytes of weights are kept in pieces. O of them stand in
no block (embedding, head), the rest in L equal blocks:

    weights        S/n + O + 2 (S - O)/L    the pieces, what stands in no block, a block in use and the next on its way
    gradients      of what is sharded likewise, G/n + O + (G - O)/L; of adapters, which are whole, as they are
    optimizer      of what is sharded 1/n; of adapters whole
    activations    as simulated

The first two lines are formulas, and not measured on several devices; what is sent is the closed form of `wire.py`,
which is held to counted bytes by a test.
"""

from dataclasses import dataclass

from minilora.experiments.simulate import MemoryReport
from minilora.experiments.wire import bytes_of_a_step
from minilora.memory import format_bytes
from minilora.model import GPTConfig
from minilora.ranges import whole

DEVICES = whole(1, 4096)


@dataclass
class DeviceReport:
    """Bytes of each device; `most` is the sum of the kinds, which do not all have their largest at one moment."""

    title: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    sent: int  # in a step, by each device

    @property
    def most(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def table(self) -> str:
        kinds = {name: getattr(self, name) for name in ("weights", "gradients", "optimizer", "activations")}
        rows = {**kinds, "together, at most": self.most, "sent in a step": self.sent}
        return "\n".join([self.title, *(f"{name:18}{format_bytes(size):>14}" for name, size in rows.items())])


def rows_of_each(batch_size: int, devices: int) -> int:
    """The rows of a batch that the busiest device has."""
    return -(-batch_size // devices)


def on_devices(report: MemoryReport, config: GPTConfig | str, devices: int, sharded: bool = False) -> DeviceReport:
    """report: of one device's rows. Raises ValueError for a number of devices out of range."""
    DEVICES.check("devices", devices)
    config = GPTConfig.preset(config) if isinstance(config, str) else config
    full = report.trainable_parameters == report.total_parameters
    trained = report.weights if full else 4 * report.trainable_parameters  # adapters are float32
    frozen = report.weights - trained
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    outside = report.weights_itemsize * (embeddings + config.hidden_size)
    sent = bytes_of_a_step(trained, frozen, outside, devices, sharded)
    how = f"{'sharded' if sharded else 'data parallel'} over {devices} devices, each with its rows of the batch"
    if not sharded:
        return DeviceReport(how, report.weights, report.gradients, report.optimizer, report.activations, sent)
    cut = frozen or trained  # what is in pieces
    block = (cut - outside) // config.num_hidden_layers
    weights = cut // devices + outside + 2 * block + (0 if full else trained)
    gradients = report.gradients // devices + outside + block if full else report.gradients
    optimizer = report.optimizer // devices if full else report.optimizer
    return DeviceReport(how, weights, gradients, optimizer, report.activations, sent)
