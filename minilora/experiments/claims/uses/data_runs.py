"""What one run of the claims about data does: train on so many examples, some with a wrong label, and ask.

Every arm makes the same number of steps of the same number of rows, so a small set is passed over more often: the
arms differ in what they are shown, not in how long they learn. Held-out examples are right in all arms. Nothing is
stopped early: rates are chosen by the loss at the end of the run, and answers are given by the model of that end.
"""

import statistics

from minilora.adapters.prompts import Prompt
from minilora.experiments.claims.study import Setting, losses
from minilora.experiments.run import Run
from minilora.inference.evaluate import answer, longest
from minilora.model import GPT
from minilora.text.batches import Batches, example_row, padded
from minilora.text.datasets import Dataset
from minilora.text.instructions import as_chat
from minilora.text.noise import sized_task, with_wrong
from minilora.text.tasks import Example, Task
from minilora.text.tokenizer import AnyTokenizer
from minilora.train import evaluate_loss

BATCH = 16
HELD_OUT, LOSS_ROWS = 200, 100  # right examples that are asked, and those of them on which the loss is measured
ASKED = 100  # of the training rows with a wrong label, at most


def measure(setting: Setting) -> dict:
    """The losses of a run and its scores: held-out answers that are right ("task"), and of the training rows with a
    wrong label those whose answer is that label ("repeated") and those whose answer is right all the same ("put
    right")."""
    tokenizer = setting.base.tokenizer
    task = sized_task(setting.plan.data, setting["examples"], setting.seed, HELD_OUT)
    validation = encoded(task.validation[:LOSS_ROWS], tokenizer)
    if setting.arm.method is None:
        model = setting.base.load()
        loss = evaluate_loss(model, validation, BATCH, "float32")
        scores = {"task": share_right(model, tokenizer, task, task.validation)}
        return {"best_validation_loss": loss, "last_validation_loss": loss, "scores": scores}
    noisy, wrong = with_wrong(task.train, setting["wrong"], setting.seed, setting["how"])
    data = Dataset(setting.plan.data, encoded(noisy, tokenizer), validation, None, task, [])
    evaluations = 1 if setting.tuning else setting["evaluations"]
    finished = setting.train(data, batch_size=BATCH, evaluations=evaluations)
    record = losses(finished) | {"last_validation_loss": finished.history.validation_loss[-1][1]}
    if setting.tuning:
        return record
    scores = {"task": share_right(finished.model, tokenizer, task, task.validation)}
    if asked := wrong[:ASKED]:
        scores["repeated"] = share_right(finished.model, tokenizer, task, [noisy[place] for place in asked])
        scores["put right"] = share_right(finished.model, tokenizer, task, [task.train[place] for place in asked])
    shown = {name: setting[name] for name in ("examples", "wrong", "how")}
    return record | {"train_loss": train_loss(finished), "scores": scores} | shown


def encoded(examples: list[Example], tokenizer: AnyTokenizer) -> Batches:
    chats = [as_chat(example, tokenizer) for example in examples]
    return padded([example_row(chat.prompt, chat.completion, tokenizer) for chat in chats], tokenizer)


def share_right(model: GPT | Prompt, tokenizer: AnyTokenizer, task: Task, examples: list[Example]) -> float:
    """Greedy answers, judged by the task's scorer against the examples' own completions."""
    chats = [as_chat(example, tokenizer) for example in examples]
    room = longest([chat.completion for chat in chats], tokenizer)
    answers = answer(model, tokenizer, [chat.prompt for chat in chats], room, batch_size=100)
    return statistics.mean(task.is_right(*pair) for pair in zip(examples, answers, strict=True))


def train_loss(finished: Run) -> list[list[float]]:
    """As the validation loss, a point for each stretch between two evaluations: its last step, and the mean loss of
    the batches that it learned from, before each was learned."""
    steps = [int(step) for step, _ in finished.history.validation_loss]
    losses = [loss for _, loss in finished.history.train_loss]
    return [[end, statistics.mean(losses[start:end])] for start, end in zip(steps, steps[1:], strict=False)]
