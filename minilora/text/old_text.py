"""Text and questions that a base has mastered and that no task here asks for: what fine-tuning may make it forget.

Each function gives rows by kind. The texts are fixed. `world_replay` and `english_replay` are of the same kinds, to be
mixed in, and no document or paragraph of theirs is measured. But both sides ask about the world's forty residents, so
some single questions stand in both.
"""

import random
import re
from pydoc_data.topics import topics

from minilora.text.batches import Batches, cut, examples, pack
from minilora.text.english import python_code
from minilora.text.tokenizer import AnyTokenizer
from minilora.text.words import listed
from minilora.text.world import DOCUMENT_KINDS, Dice, World
from minilora.train_settings import IGNORE

ROW = 128  # tokens
ANSWERS = {"notes": "answer from notes", "memory": "answer by heart"}  # kind of document -> the answer alone


def world_text(tokenizer: AnyTokenizer, count: int = 24) -> dict[str, Batches]:
    """By kind, about `count` rows' worth of documents; and of two kinds the answers alone, one question a row."""
    world = World("validation")
    short = {"resident", "instruction", "pattern"}
    rows = {}
    for kind in DOCUMENT_KINDS:
        documents = world.documents(2 * count if kind in short else count, "old text", kind)
        rows[kind] = pack([tokenizer.encode(document.text) for document in documents], ROW, tokenizer)
    for kind, name in ANSWERS.items():
        dice = Dice(f"old text, answers of {kind}")
        texts = [getattr(world, kind)(dice, questions=1).rpartition("Answer:") for _ in range(count)]
        # In training another question follows, so the answer ends with its line, and the end token is not counted.
        rows[name] = examples([(before + mark, f"{answer}\n") for before, mark, answer in texts], tokenizer, ROW)
        rows[name].labels[rows[name].labels == tokenizer.eos_id] = IGNORE
    return rows


def world_replay(tokenizer: AnyTokenizer, count: int) -> list[list[int]]:
    """Documents of all kinds as the base saw them in training.

    Stories and notes are about other people than those of `world_text`, residents are the same: of 222 documents, 11 of
    the 24 answers by heart that `world_text` measures stand in one.
    """
    return [tokenizer.encode(document.text) for document in World("train").documents(count, "replay")]


def help_topics() -> tuple[str, str]:
    """The interpreter's help topics, English prose on technical matters: half of them to measure, half to mix in.

    Topics quote one another. A paragraph that is mixed in is not measured.
    """
    texts = [text.strip() for _, text in sorted(topics.items())]
    random.Random(0).shuffle(texts)
    measured, mixed = (dict.fromkeys("\n\n".join(half).split("\n\n")) for half in (texts[::2], texts[1::2]))
    own = [paragraph for paragraph in measured if paragraph not in mixed]
    return "\n\n".join(own)[:100_000], "\n\n".join(mixed)[:100_000]


def english_text(tokenizer: AnyTokenizer, rows: int = 40) -> dict[str, Batches]:
    """Prose in so many rows, 5,080 counted tokens for 40, and Python source in half as many."""
    prose, code = (cut(tokenizer.encode(text), ROW) for text in (help_topics()[0], python_code(60_000)))
    return {"prose": spread(prose, rows), "code": spread(code, rows // 2)}


def english_replay(tokenizer: AnyTokenizer, count: int) -> list[list[int]]:
    ids = tokenizer.encode(help_topics()[1])
    return [ids[start : start + ROW - 1] for start in range(0, len(ids) - ROW, ROW)][:count]


def spread(rows: Batches, count: int) -> Batches:
    """So many of the rows, at equal distances."""
    places = [place * len(rows) // count for place in range(count)]
    return Batches(rows.input_ids[places], rows.labels[places])


# Questions to which even a small chat model knows the answer, with the word that a right answer says.
QUESTIONS = dict(
    line.rsplit(" ", 1)
    for line in """What is the capital of France? paris
What is the capital of Italy? rome
What is the capital of Japan? tokyo
What is the capital of Germany? berlin
What is the capital of Spain? madrid
What is the capital of England? london
In which country is Moscow? russia
On which continent is Egypt? africa
Which planet do we live on? earth
Which star does the Earth go around? sun
What do we call frozen water? ice
What do bees make? honey
Which animal barks? dog
Which animal says meow? cat
What do cows give us to drink? milk
How many days are in a week? seven
How many months are in a year? twelve
How many legs does a spider have? eight
What color is the sky on a clear day? blue
What color is grass? green
What color is snow? white
What is the opposite of hot? cold
What is the opposite of big? small
What is the opposite of day? night
Which season comes after winter? spring
Which day comes after Monday? tuesday
Who wrote Romeo and Juliet? shakespeare
Which ocean lies between Europe and America? atlantic
Which language do people speak in Brazil? portuguese
What gas do we need to breathe? oxygen""".splitlines()
)
NUMERALS = dict(zip(listed("seven twelve eight"), listed("7 12 8"), strict=True))


def is_answered(question: str, answer: str) -> bool:
    """Whether the word is said, in the plural too, or the number in figures.

    Stored scores named `questions` also counted parts of words, "located" for a cat: scored anew, they can be lower.
    """
    word = QUESTIONS[question]
    return re.search(rf"\b({word}|{NUMERALS.get(word, word)})s?\b", answer.lower()) is not None
