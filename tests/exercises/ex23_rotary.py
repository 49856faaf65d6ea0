"""Exercise 23: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "storage.gguf": """
def in_halves(rows, heads):
    parts = []
    for head in rows.chunk(heads):
        parts += [head[0::2], head[1::2]]
    return torch.cat(parts)
"""
}
FURTHER = [
    {
        "storage.gguf": """
def in_halves(rows, heads):
    D = len(rows) // heads
    return rows[[h * D + 2 * i + s for h in range(heads) for s in range(2) for i in range(D // 2)]]
"""
    },
    {
        "storage.gguf": """
def in_halves(rows, heads):
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
"""
    },
    {
        "storage.gguf": """
def in_halves(rows, heads):
    return rows[torch.arange(len(rows)).view(heads, -1, 2).mT.flatten()]
"""
    },
    {
        "storage.gguf": """
def in_halves(rows, heads):
    halves, D = torch.empty_like(rows), rows.shape[0] // heads
    for new in range(rows.shape[0]):
        head, place = divmod(new, D)
        second, i = divmod(place, D // 2)
        halves[new] = rows[head * D + 2 * i + second]
    return halves
"""
    },
]

PARTS = "parts += [head[0::2], head[1::2]]"
RETURN = "return torch.cat(parts)"

MUTANTS = [
    Mutant("odd first", PARTS, "parts += [head[1::2], head[0::2]]", "the odd rows come first"),
    Mutant("as they came", PARTS, "parts += [head]", "in the order they came in"),
    Mutant("across heads", RETURN, "return torch.cat([rows[0::2], rows[1::2]])", "each head has halves of its own"),
    Mutant("back", PARTS, "parts += [torch.stack(head.chunk(2), 1).flatten(0, 1)]", "the wrong direction"),
    Mutant(
        "pairs outermost",
        RETURN,
        "return rows[torch.arange(len(rows)).view(-1, heads, 2).permute(1, 2, 0).flatten()]",
        "the heads are the outermost",
    ),
    Mutant("heads backwards", "in rows.chunk(heads)", "in rows.chunk(heads)[::-1]", "the heads are in the wrong order"),
    Mutant("halves backwards", PARTS, "parts += [head[0::2].flip(0), head[1::2].flip(0)]", "in the wrong order"),
    Mutant("one head", "rows.chunk(heads)", "rows.chunk(1)", "each head has halves of its own"),
    Mutant("evens alone", PARTS, "parts += [head[0::2]]", "expected shape"),
    Mutant("evens twice", PARTS, "parts += [head[0::2], head[0::2]]", "the rows: expected"),
    Mutant("lists", "    " + RETURN, "    return parts", "expected a tensor"),
    Mutant("stacked", RETURN, "return torch.stack(parts)", "expected shape"),
    Mutant("pairs kept", RETURN, "return torch.cat(parts).unflatten(0, (heads, 2, -1))", "expected shape"),
    Mutant("columns", RETURN, "return torch.cat(parts).T.contiguous().T if rows.dim() != 1 else rows", "in the order"),
    Mutant("thirds", PARTS, "parts += [head[0::3], head[1::3], head[2::3]]", "the rows: expected"),
    Mutant("halves of the file", PARTS, "parts += [*head.chunk(2)]", "in the order they came in"),
    Mutant("quarters", PARTS, "parts += [head[0::4], head[2::4], head[1::4], head[3::4]]", "the rows: expected"),
    Mutant("wide", RETURN, "return torch.cat(parts).double()", "expected"),
    Mutant("through float", RETURN, "return torch.cat(parts).half().to(rows.dtype)", "the rows: "),
    Mutant("written over", RETURN, "return rows.copy_(torch.cat(parts))", "have changed"),
    Mutant("D of 64", "rows.chunk(heads)", "rows.split(min(64, len(rows)))", "each head has halves of its own"),
    Mutant(
        "matrices only", RETURN, "return torch.cat([part.view(len(part), rows.shape[1]) for part in parts])", "Error"
    ),
    Mutant("for two heads", "rows.chunk(heads)", "rows.chunk(min(heads, 2))", "the rows: "),
]
