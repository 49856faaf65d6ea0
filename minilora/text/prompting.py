"""What can be put in front of a question instead of training: an instruction, worked examples, notes.

And notes for the two sets of fresh facts, of which a fact can be changed by writing another note.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minilora.text import instruction_sets
from minilora.text.chat import ChatPrompt
from minilora.text.tasks import Example, Task, is_exact
from minilora.text.world import FACTS, Dice, Person, World, state


def asked(prompt: ChatPrompt) -> str:
    """The question itself: the text, or the last message of the chat."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def dressed(
    prompt: ChatPrompt, instruction: str = "", shots: Sequence[Example] = (), notes: Sequence[str] = ()
) -> ChatPrompt:
    """The prompt with what comes before it, in the base's own form.

    A text: the worked examples line by line, then "Notes: ..." as the tiny world writes them, then the prompt; its
    first line is the instruction. A chat: the instruction is the system's message and each example a turn; the notes
    stand above the question.
    """
    if isinstance(prompt, str):
        lines = [instruction, *(f"{shot.prompt}{shot.completion}" for shot in shots)]
        lines += [f"Notes: {' '.join(notes)}"] if notes else []
        return "\n".join([line for line in lines if line] + [prompt])
    turns = [{"role": "system", "content": instruction}] if instruction else []
    for shot in shots:
        turns += [*shot.prompt, {"role": "assistant", "content": shot.completion}]
    question = f"Notes: {' '.join(notes)}\nAnswer from the notes. {asked(prompt)}" if notes else asked(prompt)
    return [*turns, *prompt[:-1], {"role": "user", "content": question}]


@dataclass(frozen=True)
class Fact:
    answer: str  # what is right to say
    note: str  # as it stands among the notes


def new_people(count: int = 20) -> list[Person]:
    """People of the tiny world whom the base has never met. Their names are new, and made of a first name and a surname
    that it knows. It cannot copy a first name that it does not know: of the newcomers of the task `facts` it reads no
    note word for word, and in half of its answers only the name is wrong."""
    dice, world = Dice("new people"), World("validation")
    people: dict[str, Person] = {}
    while len(people) < count:
        person = world.person(dice, FACTS)
        people.setdefault(person.name, person)
    return list(people.values())


def new_people_task(train_size: int = 2000, seed: int = 0) -> Task:
    """Training asks in the first phrasing of each question, validation, once for each fact, in the second."""
    dice, people = Dice(f"new people task {seed}"), new_people()

    def example(person: Person, kind: str, phrasing: int) -> Example:
        question = FACTS[kind][2][phrasing].format(name=person.name)
        return Example(f"Question: {question}\nAnswer:", " " + state(person, kind))

    train = [example(dice.pick(people), dice.pick(list(FACTS)), 0) for _ in range(train_size)]
    return Task("facts", train, [example(person, kind, 1) for person in people for kind in FACTS], is_exact)


def new_people_facts(changed: bool = False) -> list[Fact]:
    """Of the new people, and after them those of 40 whom nobody asks about. changed: each value of a new person is the
    next of its list."""
    dice, world = Dice("notes"), World("train")

    def fact(person: Person, kind: str) -> Fact:
        return Fact(state(person, kind), state(person, kind, dice.pick((0, 1))))

    people = new_people()
    others = [world.person(dice, FACTS) for _ in range(40)]
    if changed:
        people = [Person(each.name, {kind: following(FACTS[kind][0], each.facts[kind]) for kind in FACTS})
                  for each in people]  # fmt: skip
    return [fact(person, kind) for person in [*people, *others] for kind in FACTS]


def people_facts(changed: bool = False) -> list[Fact]:
    """Of the instruction set `people`. changed: as above."""
    facts = []
    for name, kind, value in instruction_sets.known_facts():
        values, statement, _ = instruction_sets.FACTS[kind]
        said = statement.format(name=name, value=following(values, value) if changed else value)
        facts.append(Fact(said, said))
    return facts


def following(values: Sequence[str], value: str) -> str:
    return values[(values.index(value) + 1) % len(values)]


# Questions of every day beside those of the instruction set `pirate`, which has too few for a score.
EVERYDAY = """What is the capital of Spain?
How many hours are in a day?
What is 6 times 7?
Who wrote Hamlet?
What do rabbits eat?
Which planet is closest to the sun?
What is the opposite of up?
How do I make a cup of tea?
What color is grass?
How many legs does a cat have?
What language is spoken in Italy?
What does a teacher do?
What is the capital of Canada?
Why do birds sing?
What is a rainbow?
How many days are in a leap year?
What is the chemical symbol for water?
Which month comes after June?
What is 100 divided by 4?
What is bread made of?
How can I save money?
What is an adjective?
Who invented the telephone?
What is the coldest season?
How many players are in a football team?
Why is the sea salty?
What should I eat for breakfast?
What is the largest desert in the world?
What does a baker make?
How do I tie my shoes?
What is the capital of Greece?
What is a volcano?
How many wheels does a bicycle have?
Why do leaves fall in autumn?""".split("\n")
