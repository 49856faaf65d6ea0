"""No document is cut, no token is lost, and the loss counts what the model is asked to predict and nothing else."""

import random
from types import SimpleNamespace

import pytest
import torch

from minilora.text.batches import cut, examples, pack
from minilora.train_settings import IGNORE

BOS, EOS, LENGTH = 1, 2, 16
FRAME = SimpleNamespace(prefix=[BOS], eos_id=EOS)  # all that `pack` needs of a tokenizer


def numbered(sizes):
    """Documents of these sizes in which no token occurs twice, so that each can be followed."""
    tokens = iter(range(10, 100_000))
    return [[next(tokens) for _ in range(size)] for size in sizes]


def kept(batches):
    """Row by row, the tokens that are not padding."""
    rows = zip(batches.input_ids.tolist(), batches.labels.tolist(), strict=True)
    return [[id for id, label in zip(*row, strict=True) if label != IGNORE or id == BOS] for row in rows]


SIZES = {
    "random": random.Random(0).choices(range(LENGTH - 1), k=200),
    "all fill a row": [LENGTH - 2] * 5,
    "one token each": [1] * 50,
    "empty ones": [0, 3, 0, 0, LENGTH - 2, 0],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_packed_documents_are_whole_and_in_order(sizes):
    documents = numbered(sizes)
    batches = pack(documents, LENGTH, FRAME)
    assert batches.input_ids.shape == batches.labels.shape == (len(batches), LENGTH)
    assert batches.input_ids.dtype == batches.labels.dtype == torch.int64
    framed = [[BOS, *document, EOS] for document in documents]
    rows = kept(batches)
    assert sum(rows, []) == sum(framed, []), "a token was lost, moved or told twice"
    assert all(row[0] == BOS and row[-1] == EOS for row in rows), "a document was cut in two"
    for row, following in zip(rows, rows[1:], strict=False):
        first = following[: following.index(EOS) + 1]
        assert len(row) + len(first) > LENGTH, f"{first} would have fitted the row before"


def test_the_end_counts_where_one_token_is_begin_and_end():
    """As in GPT-2: what stands in front of a document is the end of the one before, and is not told apart by its id."""
    batches = pack(numbered([3, 4, 0]), LENGTH, SimpleNamespace(prefix=[EOS], eos_id=EOS))
    ends = int((batches.labels == EOS).sum())
    assert ends == 3, f"each of the 3 documents has one end that counts, not {ends} in all"
    assert batches.labels[0, 0] == IGNORE and batches.counted_tokens == 3 + 4 + 3, "the token in front counts"


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_packed_rows_count_every_token_but_bos_and_padding(sizes):
    documents = numbered(sizes)
    batches = pack(documents, LENGTH, FRAME)
    counted = batches.labels != IGNORE
    assert torch.equal(batches.labels[counted], batches.input_ids[counted]), "a label is not the token it stands at"
    assert BOS not in batches.labels, "<bos> is counted"
    assert int((batches.labels == EOS).sum()) == len(documents), "each document has one end, and padding is not one"
    assert batches.counted_tokens == sum(len(document) + 1 for document in documents), (
        f"{batches.counted_tokens} tokens count"
    )


@pytest.mark.parametrize("size", [LENGTH - 1, LENGTH, 2 * LENGTH - 2, 5 * LENGTH + 3])
def test_a_document_longer_than_a_row_is_cut_into_whole_rows(size):
    documents = numbered([3, size, 3])
    batches = pack(documents, LENGTH, FRAME)
    rows = kept(batches)
    assert sum(rows, []) == sum(([BOS, *document, EOS] for document in documents), [])
    assert rows[0] == [BOS, *documents[0], EOS], "the long document should begin a row of its own"
    pieces = (size + 2) // LENGTH
    assert all(len(row) == LENGTH for row in rows[1 : 1 + pieces])
    # The first token of a row has nothing before it: of the long document, a row's first token is not predicted.
    lost = -(-(size + 2) // LENGTH) - 1
    assert batches.counted_tokens == size + 1 - lost + 2 * 4, (
        f"{size + 1 - lost + 2 * 4} tokens count, not {batches.counted_tokens}"
    )


def test_cut_keeps_every_token_of_whole_rows():
    ids = list(range(100))
    batches = cut(ids, LENGTH)
    assert batches.input_ids.shape == (6, LENGTH)
    assert batches.input_ids.flatten().tolist() == ids[:96]
    assert torch.equal(batches.labels, batches.input_ids)
    assert batches.counted_tokens == 6 * (LENGTH - 1), f"{6 * (LENGTH - 1)} tokens count, not {batches.counted_tokens}"
    batches.labels[0, 0] = IGNORE
    assert batches.input_ids[0, 0] == 0, "labels and input_ids share their memory"


def test_cut_refuses_less_than_a_row():
    assert len(cut(list(range(LENGTH)), LENGTH)) == 1
    with pytest.raises(ValueError, match="15 tokens, fewer than one sequence of 16"):
        cut(list(range(LENGTH - 1)), LENGTH)


PAIRS = [("Question: Where?\nAnswer:", " In Marlow."), ("Say it:", " Arr, matey!"), ("", " alone"), ("Nothing:", "")]


def test_examples_count_the_completion_and_its_end(tokenizer):
    batches = examples(PAIRS, tokenizer, max_length=64)
    assert batches.input_ids.dtype == batches.labels.dtype == torch.int64
    counted = 0
    for number, (prompt, completion) in enumerate(PAIRS):
        row, labels = batches.input_ids[number].tolist(), batches.labels[number].tolist()
        before = [*tokenizer.prefix, *tokenizer.encode(prompt)]
        after = [*tokenizer.encode(completion), tokenizer.eos_id]
        padding = len(row) - len(before) - len(after)
        assert row[: len(before) + len(after)] == before + after
        assert labels == [IGNORE] * len(before) + after + [IGNORE] * padding, f"{prompt!r}: {labels}"
        counted += len(after)
    assert batches.counted_tokens == counted, f"{counted} tokens count, not {batches.counted_tokens}"
    assert min(row.tolist().count(tokenizer.eos_id) for row in batches.input_ids) == 1, "padded beyond the longest"


def test_examples_refuse_one_that_is_too_long(tokenizer):
    longest = max(len(tokenizer.encode(prompt)) + len(tokenizer.encode(completion)) + 2 for prompt, completion in PAIRS)
    assert examples(PAIRS, tokenizer, longest).input_ids.shape == (len(PAIRS), longest)
    with pytest.raises(ValueError, match=f"{longest} tokens .* {longest - 1}: 'Say it"):
        examples(PAIRS, tokenizer, longest - 1)
