"""One run of the studies in `prompting`: a question is answered behind a prompt, by the base or by what was trained."""

import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random

from minilora.experiments.claims.study import ROW, Setting
from minilora.experiments.methods import BaseFolder
from minilora.inference.evaluate import answer, longest
from minilora.storage.config import load_config
from minilora.text.batches import answered, cut, examples, pack
from minilora.text.chat import ChatPrompt, encode_prompt
from minilora.text.datasets import INSTRUCTION_TRAINING, TRAINING, Dataset, data_named, load_dataset
from minilora.text.invented import invented_task
from minilora.text.prompting import EVERYDAY, Fact, asked, dressed, new_people_facts, new_people_task, people_facts
from minilora.text.retrieval import BM25
from minilora.text.tasks import Example, Task, load_task
from minilora.text.tokenizer import AnyTokenizer
from minilora.text.world import World
from minilora.train import evaluate_loss

LOSS_QUESTIONS = 50  # that the loss behind a prompt is measured on; it is there to be looked at and decides nothing
CHAT_TOKENS = 48  # of an answer in a chat at least: one that is right may be longer than ours


@lru_cache(maxsize=8)
def task_of(data: str, base: BaseFolder) -> Task:
    """The task, at the scale of the base. To `pirate` as an instruction set come questions without an answer of ours,
    because its 16 are too few: its scorer needs none."""
    if base.tokenizer.chat_template is None:
        return new_people_task() if data == "people" else load_task(data)
    if data == "invented":
        return invented_task()
    task = load_dataset(data_named(data), base.tokenizer, ROW).task
    assert task
    more = EVERYDAY if data == "pirate" else []
    return replace(task, validation=[*task.validation, *(Example([user(question)], "") for question in more)])


def facts_of(setting: Setting, changed: bool = False) -> list[Fact]:
    tiny = setting.base.tokenizer.chat_template is None
    return new_people_facts(changed) if tiny else people_facts(changed)


def user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


@lru_cache(maxsize=2)
def old_text_loss(base: BaseFolder) -> float:
    return loss_on_old_text(base.load(), base)


def loss_on_old_text(model, base: BaseFolder) -> float:
    """Of the world's documents for the base that knows the world, of English prose for the one that knows English."""
    if base.tokenizer.chat_template is None:
        rows = pack(map(base.tokenizer.encode, old_documents()), ROW, base.tokenizer)
    else:
        topics = "\n".join(pydoc_data.topics.topics[topic] for topic in ("objects", "naming", "numeric-types", "try"))
        rows = cut(base.tokenizer.encode(topics)[:4096], 256)
    return evaluate_loss(model, rows, 16, "float32")


def old_documents() -> list[str]:
    return [document.text for document in World().documents(120, seed="old text")]


# Prompts


@dataclass
class Prompts:
    asked: list[ChatPrompt]  # the questions with all that is in front of them
    kept: int  # bytes of the text that is kept for the task
    examples: int = 0  # in each, as far as the context has room
    recall: float | None = None  # how often the right note is among those retrieved


def prompts_of(setting: Setting, task: Task, questions: Sequence[Example], facts: Sequence[Fact]) -> Prompts:
    """The arm's prompts for these questions. facts: what the notes say."""
    instruction = "" if setting.arm.method else setting["instruction"]
    if setting["notes"]:
        chosen = noted(setting, questions, facts)
        prompts = [
            dressed(question.prompt, instruction, notes=[facts[place].note for place in places])
            for question, places in zip(questions, chosen, strict=True)
        ]
        right = [facts[place].answer == question.completion.strip()
                 for question, places in zip(questions, chosen, strict=True) for place in places]  # fmt: skip
        return Prompts(prompts, size([instruction, *(fact.note for fact in facts)]), 0, sum(right) / len(questions))
    if not setting["examples"]:
        return Prompts([dressed(question.prompt, instruction) for question in questions], size([instruction]))
    pool = list({asked(example.prompt): example for example in task.train}.values())
    drawn = Random(setting.seed).sample(pool, min(len(pool), 16))  # one list for all questions, new for each seed
    if setting["nearest"]:  # the nearest last, next to the question
        index = BM25([asked(example.prompt) for example in pool])
        shots = [[pool[place] for place in reversed(index.best(asked(question.prompt), setting["examples"]))]
                 for question in questions]  # fmt: skip
    else:
        shots = [drawn[: setting["examples"]] for _ in questions]
    room = load_config(setting.base.directory).max_position_embeddings - new_tokens(setting, task)
    count = setting["examples"]
    while True:
        prompts = [
            dressed(question.prompt, instruction, own[len(own) - count :])
            for question, own in zip(questions, shots, strict=True)
        ]
        most = max(len(encode_prompt(setting.base.tokenizer, prompt)) for prompt in prompts)
        if most <= room:
            break
        count = min(count - 1, count * room // most)
    kept = pool if setting["nearest"] else shots[0][:count]
    text = [asked(example.prompt) + example.completion for example in kept]
    return Prompts(prompts, size([instruction, *text]), count)


def noted(setting: Setting, questions: Sequence[Example], facts: Sequence[Fact]) -> list[list[int]]:
    """For each question the places of the notes that go into its prompt: the right one, or those that BM25 finds."""
    if setting["notes"] == "oracle":
        place = {fact.answer: number for number, fact in enumerate(facts)}
        return [[place[question.completion.strip()]] for question in questions]
    index = BM25([fact.note for fact in facts])
    return [index.best(asked(question.prompt), setting["notes"]) for question in questions]


def size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def new_tokens(setting: Setting, task: Task) -> int:
    most = longest([example.completion for example in task.validation], setting.base.tokenizer)
    return max(most, CHAT_TOKENS) if setting.base.tokenizer.chat_template else most


# Runs


def measure(setting: Setting) -> dict:
    """The score, and what it costs: bytes kept, tokens and seconds an answer, seconds to change a fact, and by how much
    the loss on old text rose. Where there are facts, also how often the changed one is said once all have changed and
    nothing was trained again."""
    base, task = setting.base, task_of(setting.plan.data, setting.base)
    facts = facts_of(setting) if setting.plan.data == "people" else []
    if setting.arm.method:
        finished = setting.train(dataset_of(setting, task, facts), evaluations=1)
        model, loss = finished.model, finished.history.validation_loss[-1][1]
        if setting.tuning:
            return {"loss": loss}
        with tempfile.TemporaryDirectory() as folder:
            saved = finished.save(Path(folder) / "trained")
        seconds = sum(finished.history.step_seconds)
        forgot = loss_on_old_text(model, base) - old_text_loss(base)
    else:
        model, saved, seconds, forgot = base.load(), 0, 0.0, 0.0
    prompts = prompts_of(setting, task, task.validation, facts)
    if not setting.arm.method:
        loss = loss_behind(model, base.tokenizer, prompts.asked[:LOSS_QUESTIONS], task)
    began = time.perf_counter()
    answers = answers_of(setting, model, task, prompts.asked)
    took = time.perf_counter() - began
    scores = {"task": right(task, task.validation, answers)}
    if facts and (setting.arm.method or setting["notes"]):
        seconds, scores["changed"] = change(setting, model, task, answers, seconds)
    return {
        "loss": loss,
        "scores": scores,
        "bytes": saved + prompts.kept,
        "prompt_tokens": mean_tokens([encode_prompt(base.tokenizer, prompt) for prompt in prompts.asked]),
        "answer_tokens": mean_tokens([base.tokenizer.encode(each, continues=True) for each in answers]),
        "seconds_per_answer": round(took / len(answers), 4),
        "seconds_to_change": round(seconds, 4),
        "forgot": round(forgot, 4),
        "examples": prompts.examples,
        "recall": prompts.recall,
        "said": answers[:3],
    }


def dataset_of(setting: Setting, task: Task, facts: Sequence[Fact]) -> Dataset:
    """Training and validation as this arm's prompts put them: with notes, if it has any, and without instruction."""
    train = task.train
    if setting["train"]:  # the examples that a prompt would show
        pool = list({asked(example.prompt): example for example in train}.values())
        train = Random(setting.seed).sample(pool, setting["train"])

    def batches(part: Sequence[Example]):
        part = [example for example in part if example.completion]
        prompts = prompts_of(setting, task, part, facts).asked
        pairs = zip(prompts, [example.completion for example in part], strict=True)
        return examples(pairs, setting.base.tokenizer, 2 * ROW)

    training = TRAINING if setting.base.tokenizer.chat_template is None else INSTRUCTION_TRAINING
    return Dataset(task.name, batches(train), batches(task.validation), None, task, [], training=dict(training))


def loss_behind(model, tokenizer: AnyTokenizer, prompts: Sequence[ChatPrompt], task: Task) -> float:
    """Of the right answers, each given its prompt: nats a token. Without the end token, in whose place the tiny base
    goes on with another question."""
    pairs = [pair for pair in zip(prompts, task.validation, strict=False) if pair[1].completion]
    before = [encode_prompt(tokenizer, prompt) for prompt, _ in pairs]
    after = [tokenizer.encode(example.completion, continues=True) for _, example in pairs]
    return evaluate_loss(model, answered(before, after, tokenizer), 8, "float32")


def answers_of(setting: Setting, model, task: Task, prompts: Sequence[ChatPrompt]) -> list[str]:
    """Greedy answers. The tiny base was taught with one question after the other, so its answer is the first line."""
    given = answer(model, setting.base.tokenizer, prompts, new_tokens(setting, task))
    return [each.partition("\n")[0] if isinstance(prompt, str) else each
            for each, prompt in zip(given, prompts, strict=True)]  # fmt: skip


def right(task: Task, questions: Sequence[Example], answers: Sequence[str]) -> float:
    return statistics.mean(task.is_right(*pair) for pair in zip(questions, answers, strict=True))


def change(setting: Setting, model, task: Task, answers: list[str], seconds: float) -> tuple[float, float]:
    """All facts change. Without notes the answers stay, and a change takes another training. With notes these are
    written anew, and the time is that of writing one and indexing all."""
    before, after = facts_of(setting), facts_of(setting, changed=True)
    now = {old.answer: new.answer for old, new in zip(before, after, strict=True)}
    space = " " if isinstance(task.validation[0].prompt, str) else ""
    questions = [replace(each, completion=space + now[each.completion.strip()]) for each in task.validation]
    if setting["notes"]:
        notes = [fact.note for fact in before]
        began = time.perf_counter()
        notes[0] = after[0].note
        BM25(notes)
        seconds = time.perf_counter() - began
        answers = answers_of(setting, model, task, prompts_of(setting, task, questions, after).asked)
    return seconds, right(task, questions, answers)


def mean_tokens(encoded: Sequence[Sequence[int]]) -> float:
    return round(statistics.mean(map(len, encoded)), 1)
