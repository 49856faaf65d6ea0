"""What a model knows: its answers held against the world's scorers, its loss against the world's exact entropy."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from minilora.adapters.prompts import Prompt
from minilora.inference.generate import generate
from minilora.model import GPT
from minilora.ranges import COUNT
from minilora.text.batches import pack
from minilora.text.chat import ChatPrompt, encode_prompt
from minilora.text.tasks import Example, Task
from minilora.text.tokenizer import AnyTokenizer
from minilora.text.world import Dice, World, is_right_list, nats_per_token
from minilora.train import evaluate_loss


def answer(
    model: GPT | Prompt,
    tokenizer: AnyTokenizer,
    prompts: Sequence[ChatPrompt],
    max_new_tokens: int = 64,
    batch_size: int = 50,
) -> list[str]:
    """Greedy answers, each up to an end token. Prompts of like length share a batch, so that little is padded."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(encoded[row]))
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), "answering", leave=False, disable=None):  # None: if a terminal
        rows = order[start : start + batch_size]
        asked, ends = [encoded[row] for row in rows], tokenizer.end_ids
        generated = generate(model, asked, max_new_tokens, eos_id=ends, vocab_size=tokenizer.vocab_size)
        for row, ids in zip(rows, generated, strict=True):
            answers[row] = tokenizer.decode(ids)
    return answers


def longest(completions: Sequence[str], tokenizer: AnyTokenizer) -> int:
    """Tokens that suffice for any of these completions, with a few to spare, so that a wrong answer can show."""
    return max(len(tokenizer.encode(completion, continues=True)) for completion in completions) + 4


@dataclass
class Scored:
    """A task's validation examples with the model's answers; `score` is the fraction that is right."""

    examples: list[Example]
    answers: list[str]
    right: list[bool]

    @property
    def score(self) -> float:
        return sum(self.right) / len(self.right)


def score_task(model: GPT | Prompt, tokenizer: AnyTokenizer, task: Task, count: int | None = None) -> Scored:
    """The model's answers to the first `count` validation examples (None: all), judged by the task's own scorer."""
    examples = task.validation[:count]
    prompts = [example.prompt for example in examples]
    answers = answer(model, tokenizer, prompts, longest([example.completion for example in examples], tokenizer))
    right = [task.is_right(example, given) for example, given in zip(examples, answers, strict=True)]
    return Scored(examples, answers, right)


@dataclass
class WorldReport:
    """Fractions of exact answers, and the loss on fresh world text beside its exact floor, in nats per token."""

    scores: dict[str, float]
    count: int  # questions behind each score
    loss: float
    floor: float

    def table(self) -> str:
        lines = [f"{name:<34}{score:7.1%}" for name, score in self.scores.items()]
        above = f"{self.loss / self.floor - 1:.1%} above the floor"
        lines.append(f"{'loss on world text':<34}{self.loss:7.4f} nats per token, {above}")
        lines.append(f"{'entropy floor':<34}{self.floor:7.4f} nats per token, which no model can beat on average")
        return f"exact answers, {self.count} questions each\n" + "\n".join(lines)


def evaluate_world(model: GPT | Prompt, tokenizer: AnyTokenizer, count: int = 200, seed: int = 1) -> WorldReport:
    """Scores on `count` questions of each kind, and the loss on `count` documents that training never saw.

    Notes are about held-out people. Residents are those of training: facts known by heart cannot be held out. The
    documents are fresh ones from the distribution that training drew from. Raises ValueError for a count out of range.
    """
    COUNT.check("count", count)
    held_out, known = World("validation"), World("train")
    kinds = {
        "answers from notes, one person": lambda dice: held_out.notes(dice, people=1, questions=1),
        "answers from notes, two people": lambda dice: held_out.notes(dice, people=2, questions=1),
        "answers from memory": lambda dice: known.memory(dice, questions=1),
        "instructions": lambda dice: held_out.instruction(dice, tasks=1),
    }
    scores = {}
    for name, make in kinds.items():
        dice = Dice(f"evaluate {name} {seed}")
        split = [make(dice).rpartition("Answer:") for _ in range(count)]
        prompts = [before + mark for before, mark, _ in split]
        expected = [completion for _, _, completion in split]
        answers = answer(model, tokenizer, prompts, longest(expected, tokenizer))
        # In training one question follows another, so the model goes on asking: its answer is the first line.
        first_lines = [given.partition("\n")[0] for given in answers]
        rows = zip(prompts, expected, first_lines, strict=True)
        scores[name] = sum(is_right_answer(*row) for row in rows) / count
    documents = known.documents(count, seed=f"evaluate {seed}")
    encoded = [tokenizer.encode(document.text) for document in documents]
    length = min(256, model.config.max_position_embeddings)
    loss = evaluate_loss(model, pack(encoded, length, tokenizer), batch_size=16)
    return WorldReport(scores, count, loss, nats_per_token(documents, encoded))


def is_right_answer(prompt: str, expected: str, given: str) -> bool:
    """Word for word; for a list, where many answers are right: three different things of the kind asked for."""
    if "Instruction: List three" in prompt:
        return is_right_list(prompt, given)
    return given.strip() == expected.strip()
