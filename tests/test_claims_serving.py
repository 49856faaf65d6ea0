"""Many variants of one base: what is counted and what is timed, on the shipped base and few of them."""

from dataclasses import replace

import pytest

from minilora.experiments.claims.study import BASES, Setting
from minilora.experiments.claims.together import serving
from minilora.experiments.claims.uses import costs
from minilora.experiments.run import open_base
from minilora.inference.bank import AdapterBank


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


def setting_of(base, study, arm: str, scale: str = "tiny", **settings) -> Setting:
    plan = study.plans[scale]
    return Setting(base, replace(plan, settings=plan.settings | settings), study.arms[arm], None, 0, progress=False)


def test_bytes_are_those_of_so_many_files(base):
    found = serving.bytes_of_variants(setting_of(base, serving.BYTES, "bytes", variants=2))["bytes"]
    one, adapter = (
        costs.saved_bytes(Setting(base, costs.SIZE.plans["tiny"], costs.SIZE.arms[arm], None, 0))["bytes"]
        for arm in ("full", "all linears, r=8")
    )
    assert found["models"] == 2 * one
    assert abs(found["one base and adapters"] - one - 2 * adapter) < 2000, (
        f"{found}: one is {one}, an adapter {adapter}"
    )
    assert found["adapters in slots"] == 3 * 4 * 162_816, "two adapters and the zeros, in float32"


def test_trained_adapters_are_those_that_finetune_writes_and_differ(base):
    setting = setting_of(base, serving.TRAINED, "bytes", variants=4, tasks=("json", "pirate"), **{"held out": 2})
    found = serving.bytes_of_trained(replace(setting, plan=replace(setting.plan, steps=1)))
    written = serving.bytes_of_variants(setting_of(base, serving.BYTES, "bytes", variants=4))["bytes"]
    assert (found["pairs"], found["unlike"]) == (6, 6), f"two tasks, two seeds: {found}"
    for name, expected in written.items():
        more, allowed = found["bytes"][name] - expected, 200_000 if name == "models" else 50_000  # a tokenizer each
        assert 0 <= more < allowed, f"{name}: {more} bytes more than save_adapter and save_model write, {expected}"


def test_what_is_timed_is_what_its_name_says(base, monkeypatch):
    batches = {}

    def percent(actions, rounds):
        texts = {name: action() for name, action in actions.items()}
        assert {len(rows) for rows in texts.values()} == {16} and {len(row) for row in texts["base"]} == {3}
        return dict.fromkeys(list(actions)[1:], 100.0)

    generate = AdapterBank.generate

    def watched(bank, texts, names, new):
        batches[len(batches)] = names, set(bank.resident)
        return generate(bank, texts, names, new)

    monkeypatch.setattr(serving, "percent", percent)
    monkeypatch.setattr(AdapterBank, "generate", watched)
    setting = setting_of(base, serving.TIME, "time", "smollm2", variants=20, prompt_length=4, new_tokens=3)
    scores = serving.time_of_variants(setting)["scores"]
    assert list(scores) == ["one adapter", "4 adapters", "16 adapters", "of four kinds"]
    assert [len(set(names)) for names, _ in batches.values()] == [1, 4, 16, 7]
    assert all(len(resident) >= 20 for _, resident in batches.values()), "all adapters are resident"
    assert {batches[3][0].count(kind) for kind in ("dora", "soft prompt", "prefix")} == {4}
