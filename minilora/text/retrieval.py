"""A retriever: which of many texts to put into the prompt. BM25 counts words and knows nothing of their meaning.

    score(query, text) = Σ over the query's words w of  idf(w) · f · (k1 + 1) / (f + k1 · (1 - b + b · length / mean))

f is how often w stands in the text, length is the text's number of words, and mean that of all texts. idf is large for
a word that few of the texts have: log(1 + (N - n + 0.5) / (n + 0.5)), with w in n of the N texts. k1 says how soon more
of the same word stops counting, b how much a long text is held back (Robertson and Zaragoza 2009, section 3; the 1 in
the logarithm, which keeps idf above zero, is Lucene's).
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class BM25:
    """An index of texts. Raises ValueError for none."""

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75):
        if not texts:
            raise ValueError("a retriever needs at least one text")
        counts = [Counter(words_of(text)) for text in texts]
        lengths = [sum(each.values()) for each in counts]
        mean = max(1, sum(lengths)) / len(texts)
        self.size = len(texts)
        self.weights: dict[str, dict[int, float]] = defaultdict(dict)  # word -> text -> what it adds to the score
        for text, (each, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, f in each.items():
                self.weights[word][text] = f * (k1 + 1) / (f + k1 * (1 - b + b * length / mean))
        for having in self.weights.values():
            idf = math.log(1 + (self.size - len(having) + 0.5) / (len(having) + 0.5))
            for text in having:
                having[text] *= idf

    def best(self, query: str, count: int) -> list[int]:
        """The `count` texts with the highest scores, best first; of equals, the earlier one first."""
        scores = [0.0] * self.size
        for word in words_of(query):
            for text, weight in self.weights.get(word, {}).items():
                scores[text] += weight
        return sorted(range(self.size), key=lambda text: -scores[text])[:count]
