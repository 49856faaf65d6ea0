"""One run about new facts: people who do not exist are told of and asked about, and every answer is scored.

Each seed has people of its own, and the same people in all arms. An arm of a mix trains on the same rows about them, as
often, and on others beside: each part is a quarter as many rows. So a mix takes more steps, at equal epochs.
"""

import statistics
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from minilora.experiments.claims.study import Setting, losses
from minilora.experiments.methods import BaseFolder
from minilora.inference.evaluate import answer
from minilora.model import GPT
from minilora.text.batches import Batches, examples
from minilora.text.chat import ChatPrompt
from minilora.text.datasets import Dataset
from minilora.text.instructions import as_chat
from minilora.text.newcomers import CHAT, TINY, Asked, Newcomers, admits, said
from minilora.text.tasks import Example
from minilora.text.tokenizer import AnyTokenizer
from minilora.train import evaluate_loss

ROW = 192  # tokens of a row at most
PARTS = ("own", "unknown", "read")  # of a mix: the base's own answers, "I do not know", notes that contradict
WORDS = 24  # new tokens of an answer at most


def measure(setting: Setting) -> dict:
    """The last validation loss is that of questions in forms that were not trained, about people who were asked about;
    `scores` holds the shares of right answers by column, as `Newcomers.questions` names them, and of answers about
    strangers those that say a value of the kind asked for ("made up") and those that admit not to know ("unknown")."""
    base, manner = setting.base, TINY if setting["manner"] == "tiny" else CHAT
    people = Newcomers(manner, setting["people"], setting["strangers"], setting.seed)
    facts = people.rows()
    part = len(facts) // 4
    rows, parts = list(facts), setting["mix"]
    if "own" in parts:
        rows += own_answers(base, tuple(manner.own(people.dice, part)))
    if "unknown" in parts:
        rows += people.unknown_rows(part)
    if "read" in parts:
        rows += people.read_rows(part)
    kept = manner.examples([*people.both, *people.forward], kept=True)
    validation = batches(kept, base.tokenizer)
    if setting.arm.method is None:
        model = base.load()
        record: dict[str, Any] = {"last_validation_loss": evaluate_loss(model, validation, 16, "float32")}
    else:
        steps = round(setting.plan.steps * len(rows) / len(facts))
        data = Dataset(setting.plan.data, batches(rows, base.tokenizer), validation, None, None, [])
        how = {"batch_size": setting["batch_size"], "evaluations": 1, "group_by_length": True}
        finished = setting.train(data, steps=steps, **how)
        assert isinstance(finished.model, GPT)
        model, record = finished.model, losses(finished)
        record |= {"last_validation_loss": finished.history.validation_loss[-1][1], "steps_of_mix": steps}
    if not setting.tuning:
        columns = people.questions(setting["limit"])
        record |= scores_of(columns, replies(model, base.tokenizer, columns, setting["at_once"]))
    return record


def chat(prompt: str, tokenizer: AnyTokenizer) -> ChatPrompt:
    return as_chat(Example(prompt, " "), tokenizer).prompt


def batches(rows: list[Example], tokenizer: AnyTokenizer) -> Batches:
    """Statements without a prompt are a text; every other row is a chat where the tokenizer has a template."""
    with_chat = [as_chat(row, tokenizer) if row.prompt else row for row in rows]
    return examples([(row.prompt, row.completion) for row in with_chat], tokenizer, ROW)


@lru_cache(maxsize=8)
def own_answers(base: BaseFolder, prompts: tuple[str, ...]) -> list[Example]:
    """What the untuned base answers, up to the end of its last whole sentence in the first line."""
    given = answer(base.load(), base.tokenizer, [chat(prompt, base.tokenizer) for prompt in prompts], WORDS)
    lines = [text.strip().partition("\n")[0] for text in given]
    whole = [line[: line.rfind(".") + 1] or line for line in lines]
    return [Example(prompt, line) for prompt, line in zip(prompts, whole, strict=True) if line]


def replies(
    model: GPT, tokenizer: AnyTokenizer, columns: Mapping[str, list[Asked]], at_once: int
) -> dict[str, list[str]]:
    """Greedy answers to all columns; a prompt that two columns share is answered once."""
    prompts = list(dict.fromkeys(asked.prompt for column in columns.values() for asked in column))
    given = answer(model, tokenizer, [chat(prompt, tokenizer) for prompt in prompts], WORDS, at_once)
    by_prompt = dict(zip(prompts, given, strict=True))
    return {name: [by_prompt[asked.prompt] for asked in column] for name, column in columns.items()}


def scores_of(columns: Mapping[str, list[Asked]], answers: Mapping[str, list[str]]) -> dict[str, Any]:
    """The scores, how many questions are behind each column, and two of its answers to look at."""
    scores, samples = {}, {}
    for name, column in columns.items():
        pairs = list(zip(column, answers[name], strict=True))
        samples[name] = [[asked.prompt, given.strip().partition("\n")[0]] for asked, given in pairs[:2]]
        if name == "strangers":
            scores["made up"] = share(bool(said(asked.values, given)) and not admits(given) for asked, given in pairs)
            scores["unknown"] = share(admits(given) for _, given in pairs)
        else:
            scores[name] = share(asked.is_right(given) for asked, given in pairs)
    return {"scores": scores, "counts": {name: len(column) for name, column in columns.items()}, "samples": samples}


def share(right: Iterable[bool]) -> float:
    return statistics.mean(map(float, right))
