"""Regular expressions that come from a file: refused where they are none, or could take for ever.

Python matches by trying: where a part fits in several ways, each is tried before the whole is given up. `(a+)+z` can
cut n letters in 2^n ways, so thirty letters take minutes. Whoever may name an adapter's targets could stop the program.
The parsed expression tells how many ways there are, and no expression that anyone needs comes near the bound.
"""

import math
import re
from functools import lru_cache
from typing import Any

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser  # type: ignore[no-redef]

LETTERS = 40  # of the name of a layer
LARGEST_WORK = 1_500_000  # ways to try for one name, a fraction of a second
LARGEST_PATTERN = 4000  # characters


@lru_cache(maxsize=20_000)  # a key for each layer, each held against every layer: more than `re` itself would keep
def compile_pattern(pattern: str) -> re.Pattern:
    """The expression. ValueError for one that is none, is very long, or could take very long to match."""
    if len(pattern) > LARGEST_PATTERN:
        raise ValueError(f"an expression of {len(pattern)} characters is too long; at most {LARGEST_PATTERN} are taken")
    try:
        # Letters that differ exclude each other, unless a flag such as (?i) makes them the same.
        ways, repeats = count_ways(parser.parse(pattern), exclusive=not re.search(r"\(\?[a-zA-Z]*i", pattern))
        # k repetitions side by side share n letters in (n + k choose k) ways
        if ways * math.comb(LETTERS + repeats, repeats) > LARGEST_WORK:
            raise ValueError(f"the expression {pattern[:100]!r} could match in too many ways; repeat less in it")
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:100]!r} is not a regular expression: {error}") from None


def count_ways(part: Any, exclusive: bool) -> tuple[int, int]:
    """Of a parsed expression: in how many ways its options can be taken, and how many repetitions lie in one way.

    exclusive: of alternatives that begin with different letters, one can match at most.
    """
    ways, repeats = 1, 0
    for operation, value in part:
        inner = [count_ways(each, exclusive) for each in parts_of(value)]
        kind = str(operation)
        if "REPEAT" in kind and value[1] > 1:
            if inner != [(1, 0)]:
                raise ValueError("the expression repeats a part that has several ways to match by itself")
            repeats += 1
        elif kind == "BRANCH":
            letters = {each[0][1] for each in value[1] if len(each) and str(each[0][0]) == "LITERAL"}
            ways *= (max if exclusive and len(letters) == len(value[1]) else sum)(each for each, _ in inner)
            repeats += max(each for _, each in inner)
        else:
            ways *= math.prod(each for each, _ in inner) + ("REPEAT" in kind)  # x? may also be left out
            repeats += sum(each for _, each in inner)
    return ways, repeats


def parts_of(value: Any) -> list:
    """The parsed expressions directly inside an operation's value."""
    if isinstance(value, parser.SubPattern):
        return [value]
    return [part for each in value for part in parts_of(each)] if isinstance(value, (list, tuple)) else []
