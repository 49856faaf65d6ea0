"""Exercise 22: a solution in other words, and mistakes in it."""

from mutants import Mutant

NAME = "experiments.claims.knobs.capacity_runs"
SOLUTION = {
    NAME: """
def bits_missing(logits, words, row, rows):
    log_p = logits.double().log_softmax(-1)[torch.arange(len(words)), words]
    belongs = row[None] == torch.arange(rows)[:, None]
    return (belongs * -log_p).sum(1) / math.log(2)


def rows_known(logits, words, row, rows):
    wrong = logits.argmax(-1) != words
    return torch.tensor([not bool(wrong[row == number].any()) for number in range(rows)])
"""
}
FURTHER = [
    {
        NAME: """
def bits_missing(logits, words, row, rows):
    missing = [0.0] * rows
    for line, word, number in zip(logits.double(), words.tolist(), row.tolist()):
        missing[number] += float(torch.logsumexp(line, 0) - line[word]) / math.log(2)
    return torch.tensor(missing, dtype=torch.float64)


def rows_known(logits, words, row, rows):
    chosen = logits.gather(1, words[:, None])[:, 0]
    return torch.ones(rows).scatter_reduce(0, row, (chosen >= logits.amax(-1)).float(), "amin").bool()
"""
    },
    {
        NAME: """
def bits_missing(logits, words, row, rows):
    nats = F.nll_loss(F.log_softmax(logits.double(), -1), words, reduction="none")
    return torch.bincount(row, nats * math.log2(math.e), minlength=rows)


def rows_known(logits, words, row, rows):
    known = torch.full((rows,), True)
    known[row[logits.topk(1).indices[:, 0] != words]] = False
    return known
"""
    },
    {
        NAME: """
def bits_missing(logits, words, row, rows):
    missing = torch.zeros(rows, dtype=torch.float64)
    nats = F.cross_entropy(logits.to(torch.float64), words, reduction="none")
    return missing.scatter_add_(0, row, nats).div(math.log(2))


def rows_known(logits, words, row, rows):
    right = (logits.max(-1).indices == words).double()
    count = torch.zeros(rows).double()
    return count.index_add(0, row, right) == count.index_add(0, row, torch.ones_like(right))
"""
    },
]

LOG_P = "logits.double().log_softmax(-1)[torch.arange(len(words)), words]"
MISSING = "return (belongs * -log_p).sum(1) / math.log(2)"
KNOWN = "return torch.tensor([not bool(wrong[row == number].any()) for number in range(rows)])"

MUTANTS = [
    Mutant("nats", " / math.log(2)", "", "those are nats"),
    Mutant("multiplied", "/ math.log(2)", "* math.log(2)", "nats were multiplied by log(2)"),
    Mutant("log10", "/ math.log(2)", "/ math.log(10)", "that is log₁₀"),
    Mutant("sign", "-log_p", "log_p", "the sign"),
    Mutant("no logarithm", MISSING, "return (belongs * log_p.exp()).sum(1)", "that is Σ p"),
    Mutant("1 - p", MISSING, "return (belongs * (1 - log_p.exp())).sum(1)", "that is Σ (1 - p)"),
    Mutant("no softmax", ".log_softmax(-1)", "", "softmax comes first"),
    Mutant("the likeliest", LOG_P, "logits.double().log_softmax(-1).amax(-1)", "that is of the likeliest word"),
    Mutant(
        "entropy",
        LOG_P,
        "(logits.double().softmax(-1) * logits.double().log_softmax(-1)).sum(-1)",
        "the entropy of the distribution",
    ),
    Mutant("mean", ".sum(1) /", ".sum(1) / belongs.sum(1) /", "that is the mean over"),
    Mutant("all rows", ".sum(1) /", ".sum().expand(rows) /", "the sum of all rows"),
    Mutant(
        "no accumulation",
        MISSING,
        "out = torch.zeros(rows).double()\n    out[row] += -log_p / math.log(2)\n    return out",
        "index_add adds them all",
    ),
    Mutant(
        "in their order",
        MISSING,
        "return torch.stack([-part.sum() / math.log(2) for part in log_p.tensor_split(rows)])",
        "row says where each belongs",
    ),
    Mutant("softmax, then log", ".log_softmax(-1)", ".softmax(-1).log()", "take log_softmax or cross_entropy"),
    Mutant("clamped", ".log_softmax(-1)", ".softmax(-1).clamp(min=1e-9).log()", "bits missing: expected"),
    Mutant("narrow", MISSING, MISSING.replace("return ", "return (") + ").float()", "got those of torch.float32"),
    Mutant("one number", ".sum(1) /", ".sum() /", "expected shape"),
    Mutant("any", ".any()", ".all()", "one right word is not enough"),
    Mutant("the wrong way round", "not bool", "bool", "the wrong way round"),
    Mutant(
        "above one half",
        "logits.argmax(-1) != words",
        "logits.softmax(-1)[torch.arange(len(words)), words] < 0.5",
        "may have p below 1/2",
    ),
    Mutant(
        "share",
        KNOWN,
        "return torch.tensor([float((~wrong[row == n]).float().mean()) for n in range(rows)])",
        "that is the share",
    ),
    Mutant(
        "count",
        KNOWN,
        "return torch.tensor([float((~wrong[row == n]).sum()) for n in range(rows)])",
        "that counts the words",
    ),
    Mutant("numbers", "return torch.tensor([not bool", "return torch.tensor([1 - int", "expected dtype torch.bool"),
    Mutant("all or nothing", KNOWN, "return (~wrong.any()).expand(rows)", "each row by itself"),
    Mutant(
        "empty row unknown",
        KNOWN,
        "return torch.tensor([bool(n in row and not wrong[row == n].any()) for n in range(rows)])",
        "it counts as known",
    ),
    Mutant(
        "the last word",
        KNOWN,
        "return torch.tensor([not any(wrong[row == n][-1:].tolist()) for n in range(rows)])",
        "only the last word of a row",
    ),
]
