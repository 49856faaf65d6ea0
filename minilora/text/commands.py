"""An invented command language, for a model that knows English: what it must say was never seen, and is scored exactly.

    Please open the window in the kitchen at seven.   ->   vok:temi/dara#7!

A new word for each action, thing and place, in a fixed order between marks. A sentence that is held out is a new
combination of words that training has shown.
"""

from functools import lru_cache

from minilora.text.batches import examples
from minilora.text.chat import ChatPrompt
from minilora.text.datasets import Dataset
from minilora.text.tasks import SYLLABLES, Example, Task, is_exact
from minilora.text.tokenizer import AnyTokenizer
from minilora.text.words import listed
from minilora.text.world import Dice

ACTIONS = listed("open close clean move paint repair lock check cover lift")
THINGS = listed("window door lamp table chair shelf clock mirror carpet heater radio cupboard curtain desk")
PLACES = listed("kitchen hall bedroom garage garden office cellar attic library bathroom")
HOURS = listed("one two three four five six seven eight nine ten eleven twelve")
WORDINGS = (
    "Please {action} the {thing} in the {place} at {hour}.",
    "At {hour}, {action} the {thing} in the {place}.",
    "I want you to {action} the {thing} in the {place}, at {hour}.",
)


def invented() -> dict[str, str]:
    dice, new = Dice("commands"), dict[str, str]()
    for old in (*ACTIONS, *THINGS, *PLACES):
        while (word := "".join(dice.pick(SYLLABLES) for _ in range(dice.pick((2, 3))))) in new.values():
            pass  # taken already
        new[old] = word
    return new


WORDS = invented()


def command_examples(count: int) -> list[Example]:
    """Different sentences in a random order."""
    dice, sentences = Dice("sentences"), dict[str, str]()
    while len(sentences) < count:
        action, thing, place, hour = map(dice.pick, (ACTIONS, THINGS, PLACES, HOURS))
        sentence = dice.pick(WORDINGS).format(action=action, thing=thing, place=place, hour=hour)
        sentences[sentence] = f"{WORDS[action]}:{WORDS[thing]}/{WORDS[place]}#{HOURS.index(hour) + 1}!"
    return [Example(f"Command: {sentence}", code) for sentence, code in sentences.items()]


@lru_cache(maxsize=2)
def commands(tokenizer: AnyTokenizer, train: int = 800, validation: int = 64) -> Dataset:
    """As chats. No held-out sentence is trained on, in whatever wording. Raises ValueError without a chat template."""
    asked = command_examples(train + validation)
    held_out = {each.completion for each in asked[:validation]}
    parts = asked[:validation], [each for each in asked[validation:] if each.completion not in held_out]
    held, shown = ([Example(user(str(each.prompt)), each.completion) for each in part] for part in parts)
    train_rows, held_rows = (
        examples([(each.prompt, each.completion) for each in part], tokenizer, 128) for part in (shown, held)
    )
    task = Task("commands", shown, held, is_exact)
    prompts = [each.prompt for each in held[:3]]
    return Dataset("commands", train_rows, held_rows, 0.0, task, prompts, training={"batch_size": 8})


def user(text: str) -> ChatPrompt:
    return [{"role": "user", "content": text}]
