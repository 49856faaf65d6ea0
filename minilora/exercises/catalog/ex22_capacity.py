"""Exercise 22: how many bits an adapter has learnt by heart."""

import math

import torch
from torch import Tensor

from minilora.exercises.checking import SIZES, Draw, Exercise, expect, require
from minilora.experiments.claims.knobs.capacity_runs import bits_missing, rows_known

EXERCISE = Exercise(
    number=22,
    slug="capacity",
    title="How much an adapter holds, in bits",
    targets=(
        "experiments.claims.knobs.capacity_runs:bits_missing",
        "experiments.claims.knobs.capacity_runs:rows_known",
    ),
    difficulty=1,
    minutes=20,
    notebook="08_how_to_set_lora",
    section="4. How much does an adapter hold?",
    explanation="""\
To measure how much an adapter holds, let it learn by heart what is random, so that nothing can be guessed, and count in
bits. A word drawn evenly from 1,024 is log₂ 1,024 = 10 bits to learn. A model that gives the right word the probability
p lacks -log₂ p of them: none at p = 1, all ten at p = 1/1,024, one at p = 1/2. Over all words

    stored = bits to learn - bits missing        missing = Σ -log₂ p(word)

Who knows which words can occur, and nothing else, has stored 0 bits. Divided by the trained parameters this is the
capacity that notebook 08 measures.

Both functions take `logits` (N, V), a line for each word to learn, whose softmax is the model's probabilities; `words`
(N,), the ids of the right words; `row` (N,), the number of the row of data that each word stands in, 0 to rows - 1, in
any order; and `rows`, how many rows there are.

- `bits_missing(logits, words, row, rows)`: for each row the sum of its words' -log₂ p, (rows,), in float64. A row
  without words lacks nothing. Logits may be in the thousands: then p is 0 in every format, and the bits are finite.
- `rows_known(logits, words, row, rows)`: for each row, (rows,) of dtype bool, whether every one of its words is the
  likeliest of all V. A row without words counts as known.""",
    hints=(
        "-log p of the right word is the cross entropy of that line, in nats; 1 bit is log(2) nats. It is "
        "computed from the logits, never from a probability that may have become 0.",
        "Sums by row: zeros(rows).index_add(0, row, values). With out[row] += values, of several words in one row only "
        "one would count. A row is known if it has no wrong word.",
        "F.cross_entropy(logits, words, reduction='none').double() are the nats; index_add them and divide by "
        "math.log(2). wrong = logits.argmax(-1) != words; index_add wrong.long(), and compare with 0.",
    ),
    question="An adapter of 10,000 trained numbers has stored 5,000 bits, half a bit for each. The numbers are "
    "float32, 32 bits each. Where are the other 31.5, and how would you find out whether they matter?",
    answer="Most digits of a weight hold nothing that anybody taught it: training leaves them where the start and "
    "noise put them, and another value would do as well. What can be learnt is limited by how finely "
    "training can place a weight and by how many weights must act together to tell one row from another. To "
    "find out, round the trained adapter to fewer bits and count again what is stored: in bfloat16 all of "
    "it is left, in 8 bits nearly all, and in 4 bits little. So a weight has more than 4 bits that matter "
    "for half a bit that is stored. That is the price of writing by gradient descent.",
)


def drawn(draw: Draw, most: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, V), words (N,), and the row of each (N,): every row has one word or more, in a mixed order."""
    V = draw.integer(3, most + 3)
    row = torch.cat([torch.arange(rows), torch.tensor([draw.integer(0, rows - 1) for _ in range(most + 1)])])
    row = row[torch.randperm(len(row), generator=draw.generator)]
    words = torch.tensor([draw.integer(0, V - 1) for _ in row])
    return 2 * draw.normal(len(row), V), words, row


def in_rows(values: Tensor, row: Tensor, rows: int) -> Tensor:
    return torch.stack([values[row == number].sum() for number in range(rows)])


def mistakes(logits: Tensor, words: Tensor) -> dict[str, Tensor]:
    """By sentence, what each mistake gives for each word."""
    p = logits.softmax(-1)
    of_word, largest = (p.gather(1, words[:, None])[:, 0], p.amax(-1))
    raw = logits.gather(1, words[:, None])[:, 0]
    return {
        "those are nats: a bit is log(2) of them, so divide by math.log(2)": -of_word.log(),
        "nats were multiplied by log(2): divide": -of_word.log() * math.log(2),
        "that is log₁₀; a bit is a factor of 2": -of_word.log10(),
        "the sign: -log₂ p is what is missing, and never negative": of_word.log2(),
        "that is Σ p, without a logarithm": of_word,
        "that is Σ (1 - p), without a logarithm": 1 - of_word,
        "log₂ of the logits is not log₂ p, nor are the logits themselves: softmax comes first": -raw / math.log(2),
        "that is of the likeliest word; it should be of the right one": -largest.log2(),
        "that is the entropy of the distribution, which does not ask which word is right": -(p * p.log2()).sum(-1),
    }


@EXERCISE.property("bits_missing: the sum of -log₂ p(word) of one row")
def one_row(draw: Draw):
    for most in SIZES:
        logits, words, row = drawn(draw, most, 1)
        wanted = -(logits.log_softmax(-1).gather(1, words[:, None])).sum()[None] / math.log(2)
        slips = {sentence: wrong.sum()[None] for sentence, wrong in mistakes(logits, words).items()}
        slips["that is the mean over the words; the bits are summed"] = wanted / len(words)
        case = {"logits": logits, "words": words, "rows": 1}
        expect(bits_missing(logits, words, row, 1), wanted, case, slips, "bits missing")


@EXERCISE.property("bits_missing: each row has the sum of its own words, in whatever order they come")
def by_row(draw: Draw):
    for most in SIZES:
        rows = draw.integer(2, most + 1)
        logits, words, row = drawn(draw, most, rows)
        each = -(logits.log_softmax(-1).gather(1, words[:, None]))[:, 0] / math.log(2)
        wanted, count = in_rows(each, row, rows), in_rows(torch.ones(len(row)).double(), row, rows)
        last = torch.zeros(rows).double()
        last[row] = each
        slips = {sentence: in_rows(wrong, row, rows) for sentence, wrong in mistakes(logits, words).items()}
        slips |= {
            "out[row] = ... keeps one word of each row, and so does out[row] += ...: index_add adds them all": last,
            "that is the mean over a row's words; the bits are summed": wanted / count,
            "that is the sum of all rows; each has its own": wanted.sum().expand(rows),
            "the words are taken in the order they come in, as many for each row; row says where each belongs": (
                torch.stack([part.sum() for part in each.tensor_split(rows)])
            ),
        }
        found = bits_missing(logits, words, row, rows)
        expect(found, wanted, {"logits": logits, "words": words, "row": row, "rows": rows}, slips, "bits missing")


@EXERCISE.property("bits_missing: 0 for what is certain, log₂ of the choices for who knows only these; 0 without words")
def meaning(draw: Draw):
    for choices in (2, 8, 1024):
        V = choices + draw.integer(1, 20)
        logits = torch.full((3, V), -1e4, dtype=torch.float64)
        logits[:2, :choices] = draw.normal(1)  # evenly among those that can occur
        words = torch.tensor([draw.integer(0, choices - 1), draw.integer(0, choices - 1), V - 1])
        logits[2, V - 1] = 1e4  # certain
        wanted = torch.tensor([0, 2 * math.log2(choices), 0]).double()
        row = torch.tensor([1, 1, 2])
        case = {"row": row, "rows": 3, "row 0": "no words", "row 1": f"two words, of {choices} that are equally likely"}
        case["row 2"] = "one word, certain"
        slips = {
            "those are nats: a bit is log(2) of them": wanted * math.log(2),
            "that is the mean over the words; the bits are summed": wanted / 2,
        }
        expect(bits_missing(logits, words, row, 3), wanted, case, slips, "bits missing")


@EXERCISE.property("bits_missing: finite and right where p has become 0; float64 from logits of any dtype")
def extremes(draw: Draw):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        low = draw.integer(1000, 5000)
        logits, words, row = torch.zeros(2, 4, dtype=dtype), torch.tensor([1, 2]), torch.tensor([0, 1])
        logits[0, 0], logits[1, 2] = low, low
        wanted = torch.tensor([low / math.log(2), 0.0], dtype=torch.float64)
        case = {"logits": logits, "words": words, "row": row, "rows": 2, "dtype": dtype}
        found = bits_missing(logits, words, row, 2)
        slip = "the logarithm of a softmax that has become 0: take log_softmax or cross_entropy"
        finite = isinstance(found, Tensor) and bool(found.isfinite().all())
        require(finite, f"expected {wanted.tolist()}, got {found}", case, slip)
        expect(found, wanted, case, what="bits missing", tolerance=tolerance)
        slip = "sums over thousands of words need more digits than float32 has: .double()"
        require(found.dtype == torch.float64, f"expected torch.float64, got {found.dtype}", case, slip)


def right_logits(draw: Draw, words: Tensor, wrong: list[int], V: int) -> Tensor:
    """Logits under which each word is the likeliest, though mostly with p below 1/2, but for those that are `wrong`."""
    logits = 0.1 * draw.normal(len(words), V)
    for place, word in enumerate(words.tolist()):
        logits[place, (word + 1) % V if place in wrong else word] = 0.6
    return logits


@EXERCISE.property("rows_known: True where every word of a row is the likeliest, however unlikely it is")
def known(draw: Draw):
    for most in SIZES:
        V, rows = 5, 4
        row = torch.tensor([0, 1, 3, 2, 1, 0, 3, 2, *[draw.integer(0, 3) for _ in range(most)]])
        words = torch.tensor([draw.integer(0, V - 1) for _ in row])
        wrong = [4, *(place for place in range(len(row)) if row[place] == 2)]  # row 1 has one, row 2 nothing else
        logits = right_logits(draw, words, wrong, V)
        hit = logits.argmax(-1) == words
        share = in_rows(hit.double(), row, rows) / in_rows(torch.ones(len(row)).double(), row, rows)
        wanted, none = torch.tensor([True, False, False, True]), torch.zeros(rows, dtype=torch.bool)
        likely = logits.softmax(-1).gather(1, words[:, None])[:, 0] > 0.5
        last = none.clone()
        last[row] = hit
        slips = {
            "one right word is not enough: all of a row's words must be": share > 0,
            "the wrong way round: that is True where a word is wrong": ~wanted,
            "the likeliest of V words may have p below 1/2: compare with argmax": in_rows(~likely, row, rows) == 0,
            "that is the share of the words that are right; a row is known or not": share,
            "that counts the words that are right; a row is known or not": in_rows(hit.double(), row, rows),
        }
        case = {"words": words, "row": row, "rows": rows, "likeliest": logits.argmax(-1)}
        found = rows_known(logits, words, row, rows)
        expect(found, wanted, case, slips, "known")
        require(found.dtype == torch.bool, f"expected dtype torch.bool, got {found.dtype}", case)


@EXERCISE.property("rows_known: a row without words is known, and no row hears of another's words")
def without_words(draw: Draw):
    for most in SIZES:
        V, rows, empty = most + 2, most + 2, draw.integer(0, most)
        row = torch.tensor([number for number in range(rows) if number != empty for _ in range(2)])
        words = torch.tensor([draw.integer(0, V - 1) for _ in row])
        bad = draw.choice([number for number in range(rows) if number != empty])
        first = int((row == bad).nonzero()[0])
        wanted = torch.ones(rows, dtype=torch.bool)
        wanted[bad] = False
        missing = wanted.clone()
        missing[empty] = False
        slips = {
            "a row without words has no wrong one: it counts as known": missing,
            "one wrong word makes all rows unknown: each row by itself": torch.zeros(rows, dtype=torch.bool),
            "only the last word of a row was looked at": torch.ones(rows, dtype=torch.bool),
        }
        case = {
            "words": words,
            "row": row,
            "rows": rows,
            "without words": empty,
            "wrong": f"the first word of row {bad}",
        }
        expect(rows_known(right_logits(draw, words, [first], V), words, row, rows), wanted, case, slips, "known")
