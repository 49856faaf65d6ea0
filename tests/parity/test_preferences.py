"""A step of DPO held against TRL's trainer: the same pairs, random A and B, loss and gradients."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from minilora import load_adapter
from minilora.adapters.inject import adapter_parameters
from minilora.objectives import Preference
from minilora.rows import pieces_of
from minilora.text.batches import Batches
from minilora.train import forward, next_token_targets

REASON = "held against trl, which `pip install trl` installs beside transformers and peft"
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", reason=REASON)
    datasets = pytest.importorskip("datasets", reason=REASON)
    tokenizers = pytest.importorskip("tokenizers", reason=REASON)

BAR = 1e-6  # of the loss, and of gradients over their norm, in float64
BETA, END = 0.3, 96
PAIRS = [([3, 5, 8], [13, 21, 34, 55], [89, 14]), ([7, 7], [9], [16, 25, 36]), ([1, 2, 4, 8], [16, 32], [64, 27])]


@pytest.fixture
def trainer_of(tmp_path, monkeypatch):
    """TRL's trainer on the pairs, which are tokens already, for a model with an adapter."""

    def make(model):
        words = {f"w{number}": number for number in range(END)} | {"</s>": END}
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", pad_token="w0")
        names = "prompt_ids", "chosen_ids", "rejected_ids"
        columns = dict(zip(names, map(list, zip(*PAIRS, strict=True)), strict=True))
        data = datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint="pairs")
        config = trl.DPOConfig(str(tmp_path / "trl"), beta=BETA, report_to=[], use_cpu=True, bf16=False)
        monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda self, dataset, *how: dataset)
        return trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)

    return make


def test_loss_and_gradients_of_a_step_are_those_of_trl(both, trainer_of, tmp_path, monkeypatch, assert_close):
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm  # which computes in float32 in any model
    monkeypatch.setattr(
        norm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )
    theirs, ours = both(torch.float64)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.copy_(0.3 * weight.shape[1] ** -0.5 * torch.randn(weight.shape, generator=generator).float())
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    trainer = trainer_of(theirs)
    trainer.model.delete_adapter("ref")  # a copy of a trained adapter; without it the reference is the base
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(PAIRS))])
    expected = trainer.compute_loss(trainer.model.double(), batch)
    expected.backward()

    pairs = Batches(*(rows_of(batch, name) for name in ("input_ids", "labels")))
    objective = Preference(BETA)
    (piece,) = pieces_of(1, None, pairs.input_ids, next_token_targets(pairs.labels))
    for parameter in adapter_parameters(ours):
        parameter.data = parameter.data.double()
    known = objective.before(ours, piece, "float32")
    loss = objective.loss(forward(ours, piece.input_ids, piece.where, "float32"), piece, known) / len(PAIRS)
    loss.backward()
    assert abs(loss.item() - 0.693147) > 0.05, f"the adapter should matter to the pairs, and the loss is {loss.item()}"
    assert_close("loss", loss.detach().float(), expected.detach(), BAR)
    given = {name.replace("base_model.model.", "").replace(".default.weight", ""): weight.grad
             for name, weight in trainer.model.named_parameters() if weight.grad is not None}  # fmt: skip
    found = {name: weight.grad for name, weight in ours.named_parameters() if weight.grad is not None}
    assert given.keys() == found.keys(), f"trained by one alone: {given.keys() ^ found.keys()}"
    size = torch.stack([gradient.norm() for gradient in given.values()]).norm()
    for name, gradient in given.items():
        assert_close(name, found[name] / size, gradient / size, BAR)


def rows_of(batch, name):
    """TRL's batch, all chosen rows before all rejected ones, as pairs of rows, (N, 2, T)."""
    ids, counts = batch["input_ids"], batch["completion_mask"].bool()
    rows = ids if name == "input_ids" else ids.masked_fill(~counts, -100)
    return torch.stack(rows.chunk(2), dim=1)
