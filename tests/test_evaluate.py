"""Each answer goes to its own question, the scorers judge what was generated, and the report says what it means."""

import pytest
import torch

from minilora.inference import evaluate
from minilora.inference.evaluate import WorldReport, answer, evaluate_world, is_right_answer, longest, score_task
from minilora.model import GPT, GPTConfig
from minilora.text.batches import pack
from minilora.text.tasks import TASKS, load_task
from minilora.text.world import FACTS, World, state
from minilora.train import evaluate_loss

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

    def generate(model, prompts, max_new_tokens, eos_id, vocab_size):
        assert (eos_id, vocab_size) == (tokenizer.end_ids, tokenizer.vocab_size)
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
    assert scored.score == sum(scored.right) / 12 < 1, (
        f"{sum(scored.right)} of 12 are right, and the score is {scored.score}"
    )
    assert scored.examples == task.validation and len(scored.answers) == 12
    assert score_task(None, tokenizer, task, count=2).score == 1, "the first two answers are right"


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
    assert right == ["answers from memory"], f"1 from memory, and only there: {report.scores}"
    assert [score for score in report.scores.values() if score != 1] == [0, 0, 0], (
        f"1 from memory, else 0: {report.scores}"
    )
    # An untrained model knows nothing: about log(vocabulary) nats per token, far above the floor.
    assert 0 < report.floor < 3 < report.loss < 10, f"floor {report.floor}, loss {report.loss}"


def test_the_loss_and_the_floor_are_those_of_fresh_documents(model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate, "answer", lambda model, tokenizer, prompts, most: [""] * len(prompts))
    losses = []
    for seed in (1, 3):
        report = evaluate_world(model, tokenizer, count=30, seed=seed)
        documents = World("train").documents(30, seed=f"evaluate {seed}")
        encoded = [tokenizer.encode(document.text) for document in documents]
        loss = evaluate_loss(model, pack(encoded, 256, tokenizer), 4)
        floor = sum(document.nats for document in documents) / sum(len(ids) + 1 for ids in encoded)
        for name, found, expected in (("loss", report.loss, loss), ("floor", report.floor, floor)):
            off = found - expected
            assert off == pytest.approx(0, abs=1e-6), (
                f"{name} of seed {seed}: expected {expected:.6f}, off by {off:.2g}"
            )
        assert report.count == 30, f"30 questions were asked, the report says {report.count}"
        losses.append(report.loss)
    assert losses[0] != losses[1], "another seed should read other documents"


def test_a_score_is_the_fraction_of_right_first_lines(model, tokenizer, monkeypatch):
    """Of six questions of each kind the first two are answered rightly, and then asked on."""
    right, asked = evaluate.is_right_answer, []

    def judge(prompt, expected, given):
        asked.append(given)
        return right(prompt, expected, expected) and len(asked) % 6 in (1, 2)

    monkeypatch.setattr(evaluate, "answer", lambda model, tokenizer, prompts, most: [" so\n it goes"] * len(prompts))
    monkeypatch.setattr(evaluate, "is_right_answer", judge)
    scores = evaluate_world(model, tokenizer, count=6).scores
    assert scores == pytest.approx(dict.fromkeys(scores, 2 / 6)), f"two of six are right: {scores}"
    assert set(asked) == {" so"}, f"only the first line is judged: {set(asked)}"


def test_another_seed_asks_other_questions(model, tokenizer, know_residents):
    for seed in (1, 2):
        evaluate_world(model, tokenizer, count=8, seed=seed)
    same = sum(one == two for one, two in zip(know_residents[:4], know_residents[4:], strict=True))
    assert same == 0, f"{same} of four kinds ask the same questions with another seed"


def test_instructions_are_about_names_that_training_never_saw(model, tokenizer, know_residents):
    evaluate_world(model, tokenizer, count=80)
    quoted = [prompt.partition("Put in quotes: ")[2].partition(".")[0] for prompt in know_residents[3]]
    names = {tuple(words.split()) for words in quoted if len(words.split()) == 2 and "," not in words}
    seen = {name for name in names if not World.is_validation(*name)}
    assert len(names) > 3 and not seen, f"of the names {names} these may occur in training: {seen}"


def test_the_world_is_asked_about_people_that_training_never_saw(model, tokenizer, know_residents):
    evaluate_world(model, tokenizer, count=8)
    one, two, memory, instructions = know_residents
    assert all(prompt.endswith("Answer:") for prompts in know_residents for prompt in prompts)
    for prompts, people in ((one, 1), (two, 2)):
        for prompt in prompts:
            notes = prompt.removeprefix("Notes: ").split("\n")[0].rstrip(".").split(". ")
            named = {tuple(sentence.split()[:2]) for sentence in notes}
            assert len(named) == people, f"{people} people in the notes, not {len(named)}: {prompt}"
            assert all(World.is_validation(*name) for name in named), f"{named} may occur in training"
    assert all(prompt.startswith("Question:") for prompt in memory)
    assert all(prompt.startswith("Instruction:") for prompt in instructions)


def test_the_table_says_how_far_above_the_floor_the_loss_is():
    report = WorldReport(
        {"answers from notes, one person": 0.975, "instructions": 1.0}, count=200, loss=0.412, floor=0.4
    )
    lines = [" ".join(line.split()) for line in report.table().splitlines()]
    expected = [
        "exact answers, 200 questions each",
        "answers from notes, one person 97.5%",
        "instructions 100.0%",
        "loss on world text 0.4120 nats per token, 3.0% above the floor",
        "entropy floor 0.4000 nats per token, which no model can beat on average",
    ]
    for line, right in zip(lines, expected, strict=True):
        assert line == right, f"expected {right!r}, got {line!r}"
