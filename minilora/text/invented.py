"""An invented language for a model that reads English: a hard skill, which no one has met, with one right answer.

    The old baker helped the doctor.
    gafiri tafin vepi fita.        help-PAST doctor-OBJECT baker old

Three rules (an order, a suffix for the tense, one for the object) and a dictionary of 38 words. All of it fits a
prompt, so whoever says that prompting cannot teach it has to show the prompt that holds all of it.
"""

from minilora.text.tasks import SYLLABLES, Example, Task, is_exact
from minilora.text.words import listed
from minilora.text.world import Dice

NOUNS = listed("""artist baker brother captain clerk dancer doctor driver farmer guard hunter judge king lawyer nurse
    painter queen sailor teacher uncle""")
VERBS = listed("call follow greet help join mock paint thank visit warn")
ADJECTIVES = listed("angry clever happy lazy old poor tall young")
TENSES = {"past": ("{}ed", "ri"), "present": ("{}s", ""), "future": ("will {}", "zo")}  # in English, and the suffix
OBJECT = "n"


def _dictionary() -> dict[str, str]:
    endings = [each for each in SYLLABLES if each not in ("ke", "ve")]  # "take", "five" and "move" are English
    dice, new = Dice("invented"), [first + ending for first in SYLLABLES for ending in endings]
    words = (*NOUNS, *VERBS, *ADJECTIVES)
    return dict(zip(words, dice.several(new, len(words)), strict=True))


DICTIONARY = _dictionary()
RULES = (
    "Translate the sentence into Velu, and say nothing else. Velu puts the verb first, then the object, then the "
    "subject, then the subject's adjective, if there is one; there is no word for 'the'. The verb ends in -ri for the "
    "past and in -zo for the future, and the object ends in -n. Dictionary: "
    + ", ".join(f"{old} = {new}" for old, new in DICTIONARY.items())
    + "."
)


def sentence(dice: Dice) -> tuple[str, str]:
    """An English sentence and its translation."""
    subject, other = dice.several(NOUNS, 2)
    verb, adjective = dice.pick(VERBS), dice.pick((None, *ADJECTIVES))
    english, suffix = TENSES[dice.pick(list(TENSES))]
    who = f"{adjective} {subject}" if adjective else subject
    said = [DICTIONARY[verb] + suffix, DICTIONARY[other] + OBJECT, DICTIONARY[subject]]
    said += [DICTIONARY[adjective]] if adjective else []
    return f"The {who} {english.format(verb)} the {other}.", " ".join(said) + "."


def invented_task(train_size: int = 400, validation_size: int = 100, seed: int = 0) -> Task:
    """Questions as chats. No sentence is in both parts."""
    dice = Dice(f"invented task {seed}")
    pairs: dict[str, str] = {}
    while len(pairs) < train_size + validation_size:
        english, velu = sentence(dice)
        pairs[english] = velu
    examples = [
        Example([{"role": "user", "content": f"Say it in Velu: {english}"}], velu) for english, velu in pairs.items()
    ]
    return Task("invented", examples[:train_size], examples[train_size:], is_exact)
