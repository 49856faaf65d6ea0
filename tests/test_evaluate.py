"""Each answer goes to its own question, the scorers judge what was generated, and the report says what it means."""

import pytest
import torch

from minilora.inference import evaluate
from minilora.inference.evaluate import WorldReport, answer, evaluate_world, is_right_answer, longest, score_task
from minilora.model import GPT, GPTConfig
from minilora.text.tasks import TASKS, load_task
from minilora.text.world import FACTS, World, state

PROMPTS = [
    "Say it like a pirate: now\nPirate:",
    "a",
    "Question: Where does Ada live?\nAnswer:",
    "a b",
    "",
    "Notes: x",
] * 2


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.vocab_size, 16, 32, 1, 2, max_position_embeddings=256, tie_word_embeddings=True)
    return GPT(config).double()


@pytest.fixture
def parrot(monkeypatch, tokenizer):
    """A stand-in for `generate` that says the prompt again; it keeps the batches it was asked for."""
    batches = []

    def generate(model, prompts, max_new_tokens, eos_id):
        assert eos_id == tokenizer.eos_id
        batches.append(prompts)
        return [prompt[1:][:max_new_tokens] for prompt in prompts]

    monkeypatch.setattr(evaluate, "generate", generate)
    return batches


@pytest.mark.parametrize("batch_size", [1, 5, 12, 50])
def test_answers_keep_the_order_of_their_prompts(parrot, tokenizer, batch_size):
    assert answer(None, tokenizer, PROMPTS, batch_size=batch_size) == PROMPTS
    assert max(map(len, parrot)) <= batch_size
    asked = [prompt for batch in parrot for prompt in batch]
    assert [len(prompt) for prompt in asked] == sorted(len(prompt) for prompt in asked), "like lengths share a batch"
    assert all(prompt[0] == tokenizer.bos_id for prompt in asked), "a prompt begins as in training, with <bos>"


def test_an_answer_is_no_longer_than_asked(parrot, tokenizer):
    for given in answer(None, tokenizer, PROMPTS, max_new_tokens=3):
        assert len(tokenizer.encode(given)) <= 3


def test_no_prompts_no_answers(parrot, tokenizer):
    assert answer(None, tokenizer, []) == []


def test_a_batch_answers_as_each_prompt_alone(model, tokenizer):
    together = answer(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=12)
    alone = [answer(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert together == alone


def test_longest_leaves_room_for_a_wrong_answer(tokenizer):
    completions = [" Marlow.", " Mara Hale lives in Marlow."]
    assert longest(completions, tokenizer) > max(len(tokenizer.encode(completion)) for completion in completions)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_scored_by_its_own_scorer(monkeypatch, tokenizer, name):
    task = load_task(name, 1, 12)
    known = {example.prompt: example.completion for example in task.validation}
    first, others = task.validation[:2], task.validation[2:5]
    wrong = {example.prompt for example in others} - {example.prompt for example in first}

    def know_most(model, tokenizer, prompts, max_new_tokens):
        return [known[prompt] + (" not" if prompt in wrong else "") for prompt in prompts]

    monkeypatch.setattr(evaluate, "answer", know_most)
    scored = score_task(None, tokenizer, task)
    assert scored.right == [example.prompt not in wrong for example in task.validation]
    assert scored.score == sum(scored.right) / 12 < 1
    assert scored.examples == task.validation and len(scored.answers) == 12
    assert score_task(None, tokenizer, task, count=2).score == 1


def test_is_right_answer():
    prompt = "Question: Where does Ada Dale live?\nAnswer:"
    right = " Ada Dale lives in Marlow."
    assert is_right_answer(prompt, right, right)
    assert is_right_answer(prompt, right, "Ada Dale lives in Marlow.\n")
    for wrong in (" Ada Dale lives in Kelso.", " Ada Dale lives in Marlow", f"{right} Yes.", " Marlow.", ""):
        assert not is_right_answer(prompt, right, wrong), f"accepted {wrong!r}"
    prompt = "Instruction: List three animals.\nAnswer:"
    assert is_right_answer(prompt, " fox, goat, hen.", " cow, dog, pig."), "any three animals are right"
    assert not is_right_answer(prompt, " fox, goat, hen.", " cow, dog, bread.")


@pytest.fixture
def know_residents(monkeypatch):
    """Answers as a model would that knows the residents by heart, and nothing else, and that goes on asking, as the
    documents it learned from do. Keeps the prompts."""
    known = {
        question.format(name=person.name): " " + state(person, kind)
        for person in World().residents
        for kind in FACTS
        for question in FACTS[kind][2]
    }
    seen = []

    def answer(model, tokenizer, prompts, max_new_tokens):
        seen.append(prompts)
        questions = [prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:") for prompt in prompts]
        return [known.get(question, "") + "\nQuestion: What" for question in questions]

    monkeypatch.setattr(evaluate, "answer", answer)
    return seen


def test_the_world_report_gives_each_kind_its_own_score(model, tokenizer, know_residents):
    report = evaluate_world(model, tokenizer, count=8)
    right = [name for name, score in report.scores.items() if score == 1]
    assert right == ["answers from memory"]
    assert [score for score in report.scores.values() if score != 1] == [0, 0, 0]
    # An untrained model knows nothing: about log(vocabulary) nats per token, far above the floor.
    assert 0 < report.floor < 3 < report.loss < 10


def test_the_world_is_asked_about_people_that_training_never_saw(model, tokenizer, know_residents):
    evaluate_world(model, tokenizer, count=8)
    one, two, memory, instructions = know_residents
    assert all(prompt.endswith("Answer:") for prompts in know_residents for prompt in prompts)
    for prompts, people in ((one, 1), (two, 2)):
        for prompt in prompts:
            notes = prompt.removeprefix("Notes: ").split("\n")[0].rstrip(".").split(". ")
            named = {tuple(sentence.split()[:2]) for sentence in notes}
            assert len(named) == people
            assert all(World.is_validation(*name) for name in named), f"{named} may occur in training"
    assert all(prompt.startswith("Question:") for prompt in memory)
    assert all(prompt.startswith("Instruction:") for prompt in instructions)


def test_the_table_says_how_far_above_the_floor_the_loss_is():
    report = WorldReport(
        {"answers from notes, one person": 0.975, "instructions": 1.0}, count=200, loss=0.412, floor=0.4
    )
    lines = report.table().splitlines()
    assert lines[0] == "exact answers, 200 questions each"
    assert lines[1].split() == "answers from notes, one person 97.5%".split()
    assert lines[2].split() == "instructions 100.0%".split()
    assert lines[3].split() == "loss on world text 0.4120 nats per token, 3.0% above the floor".split()
    assert lines[4].startswith("entropy floor") and "0.4000 nats per token" in lines[4]
