"""Prompting, retrieval and training: the retriever, the prompts, the invented language, and what a run records."""

import math
import re
from dataclasses import replace

import pytest

from minilora.experiments.claims.claim import summary
from minilora.experiments.claims.study import BASES, Setting
from minilora.experiments.claims.uses import prompting, prompting_runs
from minilora.experiments.claims.uses.prompting import FACTS, FACTS_ARMS, FORMAT, PROMPTS, SKILL, VOICE
from minilora.experiments.run import open_base
from minilora.experiments.tune import TUNING_SEED
from minilora.inference.evaluate import answer
from minilora.text import instruction_sets, invented, world
from minilora.text.chat import encode_prompt
from minilora.text.prompting import (
    EVERYDAY,
    asked,
    dressed,
    new_people,
    new_people_facts,
    new_people_task,
    people_facts,
)
from minilora.text.retrieval import BM25
from minilora.text.tasks import NEWCOMERS, Example
from minilora.text.world import World, state

# The retriever


def test_bm25_is_the_formula():
    texts = ["the cat sat", "the dog sat on the mat", "the bird"]
    index, mean = BM25(texts, k1=1.5, b=0.5), (3 + 6 + 2) / 3
    idf_sat, idf_the = math.log(1 + (3 - 2 + 0.5) / 2.5), math.log(1 + (3 - 3 + 0.5) / 3.5)
    assert index.weights["sat"][0] == pytest.approx(idf_sat * 2.5 / (1 + 1.5 * (0.5 + 0.5 * 3 / mean)))
    assert index.weights["the"][1] == pytest.approx(idf_the * 2 * 2.5 / (2 + 1.5 * (0.5 + 0.5 * 6 / mean)))
    assert index.best("Sat? The dog!", 2) == [1, 0]
    assert index.best("nothing of all this", 3) == [0, 1, 2], "of equals, the earlier one first"
    assert BM25([""]).best("word", 1) == [0]
    with pytest.raises(ValueError, match="at least one text"):
        BM25([])


def test_a_rare_word_counts_more_than_a_common_one():
    index = BM25(["Ada Hale keeps a hen", "Ada Moss keeps a cat", "Ada Moss keeps a dog", "Ben Dale keeps a hen"])
    assert index.best("What does Ada Dale keep?", 1) == [3] and index.best("Ada and her dog", 1) == [2]


# Prompts


def test_what_stands_in_front_of_a_question():
    shots = [Example("Question: A?\nAnswer:", " One."), Example("Question: B?\nAnswer:", " Two.")]
    text = dressed("Question: C?\nAnswer:", "Be brief.", shots, ["C is three.", "D is four."])
    assert text == (
        "Be brief.\nQuestion: A?\nAnswer: One.\nQuestion: B?\nAnswer: Two.\n"
        "Notes: C is three. D is four.\nQuestion: C?\nAnswer:"
    )
    assert dressed("Question: C?\nAnswer:") == "Question: C?\nAnswer:"
    chat = [{"role": "user", "content": "C?"}]
    shot = Example([{"role": "user", "content": "A?"}], "One.")
    turns = dressed(chat, "Be brief.", [shot], ["C is three."])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in turns[:3]] == ["Be brief.", "A?", "One."]
    assert turns[3]["content"].startswith("Notes: C is three.\n") and turns[3]["content"].endswith("C?")
    assert dressed(chat) == chat and asked(chat) == "C?"


def test_notes_are_the_worlds_own_form():
    document = next(d for d in World("validation").documents(9, 0, "notes"))
    before, question = document.text.split("\n", 1)
    assert dressed(question, notes=re.findall(r"[A-Z][^.]*\.", before.removeprefix("Notes: "))) == document.text


@pytest.mark.parametrize("facts_of, asked_about", [(new_people_facts, 80), (people_facts, 48)])
def test_a_changed_fact_is_changed_in_its_note(facts_of, asked_about):
    before, after = facts_of(), facts_of(changed=True)
    assert len(before) == len(after) and len({fact.answer for fact in before}) == len(before)
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (old.answer != new.answer) == (old.note != new.note) == (place < asked_about)
        value = new.answer.rstrip(".").split()[-1]
        assert value in new.note, "the note says the fact"


def test_the_new_people_are_new_and_asked_in_other_words():
    task, people = new_people_task(), new_people()
    assert len({person.name for person in people}) == 20
    assert all(World.is_validation(*person.name.split()) for person in people)
    assert not {each.prompt for each in task.train} & {each.prompt for each in task.validation}
    known = {fact.answer for fact in new_people_facts()}
    assert {each.completion.strip() for each in task.validation} <= known and len(task.validation) == 80
    assert {each.completion for each in task.train} == {each.completion for each in task.validation}


def test_a_name_that_the_base_does_not_know_is_not_read(base):
    facts = [(person, kind) for person in NEWCOMERS for kind in world.FACTS]
    asked = [f"Question: {world.FACTS[kind][2][0].format(name=person.name)}\nAnswer:" for person, kind in facts]
    noted = [dressed(each, notes=[state(*fact, 1)]) for each, fact in zip(asked, facts, strict=True)]
    said = [each.partition("\n")[0].strip() for each in answer(base.load(), base.tokenizer, noted, 12)]
    assert sum(each == state(*fact) for each, fact in zip(said, facts, strict=True)) == 0
    values = [person.facts[kind] in each for each, (person, kind) in zip(said, facts, strict=True)]
    assert 0.35 < sum(values) / len(values) < 0.65, "in half of the answers the value is right"


# The invented language


def test_the_invented_language_follows_its_rules():
    task, words = invented.invented_task(), invented.DICTIONARY
    assert len(set(words.values())) == len(words) == 38
    assert not {asked(each.prompt) for each in task.train} & {asked(each.prompt) for each in task.validation}
    for each in task.train:
        english = asked(each.prompt).removeprefix("Say it in Velu: ").rstrip(".").split()
        velu = each.completion.rstrip(".").split()
        adjective, verb, suffix = velu[3:], velu[0][:4], velu[0][4:]
        assert velu[1] == words[english[-1]] + "n" and velu[2] == words[english[len(adjective) + 1]]
        assert adjective == [words[old] for old in english[1 : 1 + len(adjective)]]
        said = english[len(adjective) + 2 : -2]
        stem = next(old for old, new in words.items() if new == verb)
        assert said == {"ri": [f"{stem}ed"], "": [f"{stem}s"], "zo": ["will", stem]}[suffix]
    assert all(f"{old} = {new}" in invented.RULES for old, new in words.items())
    assert "help" in words and "gafiri tafin vepi fita." in invented.__doc__
    assert task.is_right(Example("", "gafiri tafin vepi fita."), " gafiri tafin vepi fita.\n")
    assert not task.is_right(Example("", "gafiri tafin vepi fita."), "gafiri tafi vepi fita.")


# Runs

STUDIES = {"facts": FACTS, "format": FORMAT, "voice": VOICE, "skill": SKILL}


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


def setting(base, study, arm: str, seed: int = 0, steps: int = 2, **changes) -> Setting:
    plan = replace(study.plans["tiny"], steps=steps)
    what = study.arms[arm]
    what = replace(what, settings=what.settings | changes)
    return Setting(base, plan, what, 1e-3 if what.method else None, seed, progress=False)


@pytest.fixture
def few_questions(monkeypatch):
    whole = prompting_runs.task_of
    monkeypatch.setattr(
        prompting_runs, "task_of", lambda *of: replace(whole(*of), validation=whole(*of).validation[:4])
    )
    monkeypatch.setattr(prompting_runs, "old_documents", lambda: ["A short old text.", "And another one."])
    cached = prompting_runs.old_text_loss
    cached.cache_clear()
    yield
    cached.cache_clear()


def prompts(base, study, arm, **changes):
    task = prompting_runs.task_of(study.plans["tiny"].data, base)
    facts = new_people_facts() if study is FACTS else []
    where = setting(base, study, arm, **changes)
    return prompting_runs.prompts_of(where, task, task.validation, facts)


def test_examples_are_drawn_by_the_seed_and_are_as_many_as_fit(base, few_questions):
    four, sixteen = prompts(base, SKILL, "4 examples"), prompts(base, SKILL, "16 examples")
    again, other = prompts(base, SKILL, "4 examples"), prompts(base, SKILL, "4 examples", seed=1)
    assert four.asked == again.asked != other.asked
    assert (four.examples, sixteen.examples) == (4, 16)
    for each in four.asked:
        assert each.count("Dialect:") == 5 and each.endswith("Dialect:")
        head = each.split("\nSay it")[0]
        assert head in sixteen.asked[0], "those of four are among those of sixteen"
    shown = four.asked[0].rsplit("\nSay it", 1)[0].encode()
    assert abs(four.kept - len(shown)) <= 4, "what is kept is the text of the examples"
    long = prompts(base, FORMAT, "16 examples")
    lengths = [len(encode_prompt(base.tokenizer, each)) for each in long.asked]
    room = 512 - prompting_runs.new_tokens(setting(base, FORMAT, "lora"), prompting_runs.task_of("json", base))
    assert 3 <= long.examples < 16 and room - 100 < max(lengths) <= room


def test_nearest_examples_stand_next_to_the_question(base, few_questions):
    found, task = prompts(base, FACTS, "16 nearest", examples=4), new_people_task()
    pool = list(dict.fromkeys(example.prompt for example in task.train))
    for question, each in zip(task.validation, found.asked, strict=False):
        best = BM25(pool).best(question.prompt, 4)
        places = [each.index(pool[place]) for place in best]
        assert places == sorted(places, reverse=True), f"the nearest is not the last: {each}"
    assert found.kept > prompts(base, FACTS, "16 examples").kept, "all examples have to be kept"


def test_notes_hold_the_answer(base, few_questions):
    for arm, count in (("retrieval", 4), ("oracle", 1)):
        found = prompts(base, FACTS, arm)
        assert found.recall == 1
        for question, each in zip(new_people_task().validation, found.asked, strict=False):
            told, rest = each.removeprefix("Notes: ").split("\n", 1)
            assert rest == question.prompt and told.count(".") == count
            assert question.completion.split()[-1].rstrip(".") in told
    assert prompts(base, FACTS, "instruction").recall is None


def test_a_note_is_read_and_a_changed_one_too(base, few_questions):
    record = prompting_runs.measure(setting(base, FACTS, "retrieval"))
    assert record["scores"] == {"task": 1.0, "changed": 1.0} and record["forgot"] == 0
    assert record["bytes"] == sum(len(fact.note) for fact in new_people_facts()) and record["examples"] == 0
    bare = prompting_runs.measure(setting(base, FACTS, "instruction"))
    assert bare["scores"]["task"] == 0 and "changed" not in bare["scores"], "there is nothing to change"
    assert bare["prompt_tokens"] + 20 < record["prompt_tokens"]


def test_a_trained_arm_pays_in_bytes_and_in_what_it_forgets(base, few_questions):
    record = prompting_runs.measure(setting(base, FACTS, "lora and retrieval"))
    assert record["bytes"] > 600_000 and record["seconds_to_change"] < 1 and record["forgot"] != 0
    assert record["recall"] == 1 and record["prompt_tokens"] > 30
    full = prompting_runs.measure(setting(base, SKILL, "full"))
    assert full["bytes"] > 11_000_000 and full["seconds_to_change"] > 0 and set(full["scores"]) == {"task"}
    tuning = setting(base, SKILL, "lora, 16 examples", seed=TUNING_SEED)
    assert set(prompting_runs.measure(tuning)) == {"loss"}


@pytest.mark.parametrize("seed", (0, 1))
def test_the_16_that_are_trained_are_those_that_the_prompt_of_the_seed_shows(base, few_questions, seed):
    where = setting(base, SKILL, "lora, 16 examples", seed)
    task = prompting_runs.task_of("dialect", base)
    data = prompting_runs.dataset_of(where, task, [])
    shown = prompting_runs.prompts_of(setting(base, SKILL, "16 examples", seed), task, task.validation, []).asked[0]
    texts = [base.tokenizer.decode(row.tolist()) for row in data.train.input_ids]
    assert len(texts) == 16 and all(text.split("\n")[0][-20:] in shown for text in texts), "the very examples"


def test_the_instruction_stands_before_what_is_not_trained(base, few_questions):
    said = {arm: prompts(base, FORMAT, arm, instruction="Be brief.").asked[0] for arm in ("instruction", "4 examples")}
    assert all(prompt.startswith("Be brief.\n") for prompt in said.values())
    for arm in ("lora", "full", "lora, 16 examples"):
        assert "Be brief." not in prompts(base, FORMAT, arm, instruction="Be brief.").asked[0], arm


def test_forgetting_is_a_rise_of_the_loss_on_old_text(base, few_questions, monkeypatch):
    monkeypatch.setattr(prompting_runs, "old_text_loss", lambda base: 1.0)
    monkeypatch.setattr(prompting_runs, "loss_on_old_text", lambda model, base: 3.5)
    assert prompting_runs.measure(setting(base, SKILL, "lora"))["forgot"] == 2.5


def test_a_changed_fact_is_not_said_by_what_was_trained(base, few_questions):
    where = setting(base, FACTS, "lora")
    task = prompting_runs.task_of("people", base)
    answers = [each.completion for each in task.validation]
    assert prompting_runs.change(where, None, task, answers, 7.0) == (7.0, 0.0), "another training, or the old answer"
    seconds, _ = prompting_runs.change(setting(base, FACTS, "oracle"), base.load(), task, answers, 7.0)
    assert 0 < seconds < 1, "a note is written in no time, however long the training took"


# Rules


def of_scores(**scores) -> dict:
    return {
        arm: {seed: {"scores": {"task": value, "changed": value}} for seed, value in enumerate(values)}
        for arm, values in scores.items()
    }


def test_the_best_prompt_is_compared_with_lora():
    rules = {claim.name: claim.rule for claim in prompting.CLAIMS}
    runs = of_scores(**{arm: [0.1, 0.1] for arm in PROMPTS}, lora=[0.95, 0.95])
    assert rules["prompt-first"].decide(runs).verdict == "fails" and rules["hard-skill"].decide(runs).verdict == "holds"
    runs |= of_scores(**{"4 examples": [0.9, 0.9]})
    found = rules["prompt-first"].decide(runs)
    assert found.verdict == "holds" and found.number == pytest.approx(-5)
    assert rules["hard-skill"].decide(runs).verdict == "fails"
    worse = rules["prompt-first"].decide(runs | of_scores(**{"4 examples": [0.2, 0.2]}))
    assert summary([found, worse]) == "depends"


def test_together_is_compared_with_the_better_of_the_two():
    rule = next(claim.rule for claim in prompting.CLAIMS if claim.name == "lora-and-retrieval")
    runs = of_scores(**{"lora and retrieval": [0.9, 0.9], "retrieval": [0.3, 0.7], "lora": [0.6, 0.6]})
    assert rule.decide(runs).number == pytest.approx((30 + 20) / 2)


def test_what_follows_a_note_loses_nothing_when_it_changes():
    rule = next(claim.rule for claim in prompting.CLAIMS if claim.name == "edited-notes")
    runs = of_scores(**{"lora and retrieval": [0.9, 0.9]})
    assert rule.decide(runs).verdict == "holds"
    for record in runs["lora and retrieval"].values():
        record["scores"]["changed"] = 0.5
    found = rule.decide(runs)
    assert found.verdict == "fails" and found.number == pytest.approx(-40)


def test_every_study_has_the_same_arms_and_both_scales():
    assert set(FACTS.arms) - set(SKILL.arms) == {"retrieval", "oracle", "lora and retrieval"}
    for study in STUDIES.values():
        assert set(SKILL.arms) <= set(study.arms) and set(study.plans) == {"tiny", "smollm2"}
        run = {arm for claim in prompting.CLAIMS if study in claim.studies for arm in claim.rule.arms}
        assert set(study.arms) - run <= {"lora, 16 examples"}, f"{study.name}: no claim runs all arms of its table"
    assert set(prompting.LOOKS) == set(FACTS_ARMS) and prompting.bytes_in_words(662485) == "662 kB"


def test_the_figures_have_a_point_for_each_arm():
    record = {"scores": {"task": 0.5}, "prompt_tokens": 10, "answer_tokens": 5, "bytes": 700}
    runs = {arm: {0: record, 1: record | {"scores": {"task": 0.7}}} for arm in ("lora", "retrieval")}
    figure = prompting.score_over_tokens("facts", runs)
    points = figure.axes[0].containers
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["retrieval, 700 B", "lora, 700 B"]
    assert len(points) == 2 and points[0].lines[0].get_xydata().tolist() == [[15, pytest.approx(60)]]
    several = prompting.four_tasks({"a": {}, "b": runs, "c": {"full": {0: record}}, "d": {}})
    assert [axes.get_title() for axes in several.axes] == list("abcd")
    assert [text.get_text() for text in several.legends[0].get_texts()] == ["retrieval", "lora", "full"]


def test_everyday_questions_are_new():
    file = instruction_sets.shipped_file("pirate")
    files = [file, file.with_suffix(".validation.jsonl")]
    shipped = "".join(path.read_text(encoding="utf-8") for path in files)
    assert len(set(EVERYDAY)) == 34 and not [each for each in EVERYDAY if each in shipped]
