"""The server on a port of this machine: answers as alone, faults with their status, and clients that go away."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving_client import LIMIT, TEMPLATE, Client, a_base, running, text_alone, write_adapters

from minilora.__main__ import main
from minilora.inference.bank import AdapterBank
from minilora.serving import server
from minilora.serving.answering import StoppedText
from minilora.serving.reading import read_request
from minilora.serving.service import Refusal, is_adapter, open_bank
from minilora.storage.folders import WRITTEN
from minilora.text.tokenizer import open_tokenizer

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
GREEDY = dict(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def chatty(tokenizer, tmp_path_factory):
    """The small tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return open_tokenizer(folder)


@pytest.fixture(scope="module")
def adapters(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder, tokenizer.vocab_size, 16)
    return folder


@pytest.fixture(scope="module")
def few(adapters, tmp_path_factory):
    """Three of them, for servers that are quickly there."""
    folder = tmp_path_factory.mktemp("few")
    for number in range(1, 4):
        shutil.copytree(adapters / f"skill-{number}", folder / f"skill-{number}")
    return folder


@pytest.fixture(scope="module")
def alone(chatty, adapters):
    bank = open_bank(a_base(chatty.vocab_size), "tiny", adapters)
    return lambda prompt, adapter=None, new=8, **how: text_alone(bank, chatty, prompt, adapter, new, **how)


@pytest.fixture(scope="module")
def served(chatty, adapters):
    with running(chatty, adapters, max_body=20_000, max_new_tokens=40) as (client, service):
        yield client, service


@pytest.fixture(scope="module")
def client(served):
    return served[0]


def refused(answer, status: int, *named: str, param=None, code=None):
    found, body = answer
    assert found == status, f"status {found}, not {status}: {body}"
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    for name in named:
        assert name in body["error"]["message"], f"{name!r} is not in {body['error']['message']!r}"
    assert (param, code) == (body["error"]["param"], body["error"]["code"])


# What works


def test_models_are_the_base_and_its_adapters(client):
    status, body = client.send("GET", "/v1/models")
    assert status == 200 and body["object"] == "list"
    assert [model["id"] for model in body["data"]][0] == "tiny"
    assert {model["id"]: model["parent"] for model in body["data"]} == {"tiny": None} | {
        f"skill-{n}": "tiny" for n in range(16)
    }
    assert client.send("GET", "/v1/models/skill-3")[1] == next(m for m in body["data"] if m["id"] == "skill-3")
    assert client.send("GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("model", ["tiny", "skill-0", "skill-5"])
def test_a_completion_is_the_one_the_adapter_gives_alone(client, alone, chatty, model):
    prompt, adapter = "The old man said", None if model == "tiny" else model
    text, reason = alone(prompt, adapter)
    status, body = client.post(COMPLETIONS, dict(model=model, prompt=prompt, **GREEDY))
    assert status == 200 and (body["object"], body["model"]) == ("text_completion", model)
    assert body["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
    n = len(chatty.encode(prompt)) + len(chatty.prefix)
    assert body["usage"] == {"prompt_tokens": n, "completion_tokens": 8, "total_tokens": n + 8}
    assert len({alone(prompt, name)[0] for name in (None, "skill-0", "skill-5")}) == 3, "the adapters say the same"


def test_a_stream_is_the_same_text_in_pieces_and_its_usage_comes_last(client, alone):
    text, reason = alone("Once", "skill-1", 12)
    body = dict(model="skill-1", prompt="Once", temperature=0, max_tokens=12)
    events = client.events(COMPLETIONS, body | {"stream_options": {"include_usage": True}})
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + [reason] and len(reasons) > 3
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 12
    assert len({event["id"] for event in events}) == 1
    assert "usage" not in client.events(COMPLETIONS, body)[-1]


def test_a_chat_goes_through_the_template_of_the_base(client, alone):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    text, reason = alone(messages, "skill-2")
    body = dict(model="skill-2", messages=messages, temperature=0, max_completion_tokens=8)
    status, answer = client.post(CHAT, body)
    assert status == 200 and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text} and choice["finish_reason"] == reason
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    events = client.events(CHAT, body | {"messages": messages})
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
    assert events[-1]["choices"][0]["finish_reason"] == reason and events[-1]["choices"][0]["delta"] == {}


def test_each_request_has_its_own_sampling(client, alone):
    """Side by side: what a seed draws is what it draws alone."""
    asked = [dict(temperature=1.0, seed=seed, top_p=0.9) for seed in range(6)]
    asked += [dict(temperature=1.5, top_k=seed + 2, seed=seed) for seed in range(6)]
    body = dict(model="skill-4", prompt="It was", max_tokens=10)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda how: client.post(COMPLETIONS, body | how)[1]["choices"][0]["text"], asked))
    assert answers == [alone("It was", "skill-4", 10, **how)[0] for how in asked]
    assert len(set(answers)) > 6


def test_without_a_seed_two_samples_differ(client):
    body = dict(model="tiny", prompt="It was", max_tokens=20)
    assert len({client.post(COMPLETIONS, body)[1]["choices"][0]["text"] for _ in range(3)}) == 3


def test_a_stop_string_ends_the_answer_before_it(client, alone, chatty):
    text, _ = alone("Once upon", "skill-6", 30)
    stop = text[9:12]
    place = text.index(stop)
    body = dict(model="skill-6", prompt="Once upon", temperature=0, max_tokens=30)
    (choice,) = client.post(COMPLETIONS, body | {"stop": ["never said", stop]})[1]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[:place], "stop")
    events = client.events(COMPLETIONS, body | {"stop": stop, "stream_options": {"include_usage": True}})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == text[:place]
    assert 0 < events[-1]["usage"]["completion_tokens"] < 30
    ids = [*chatty.prefix, *chatty.encode("Once upon")]
    assert client.post(COMPLETIONS, body | {"prompt": ids})[1]["choices"][0]["text"] == text
    first = client.post(COMPLETIONS, body | {"prompt": [ids]})[1]["choices"][0]["text"]
    assert first == text
    end = chatty.encode(text, continues=True)[0]
    ended = client.post(COMPLETIONS, body | {"stop_token_ids": list(range(3, chatty.vocab_size))})[1]
    assert ended["choices"][0] | {"text": ""} == ended["choices"][0], f"the first token, {end} perhaps, ends it"
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stops", [["END"], ["N", "xyz"], ["\n\n"], ["ENDE", "ND"], ["D!"], []])
def test_held_back_is_what_may_begin_a_stop_string_and_nothing_else(chatty, stops):
    whole = "xENxE\nNE ENDEN\n\nD"
    text, out = StoppedText(chatty, stops), []
    for token in chatty.encode(whole):
        if not text.stopped:
            out.append(text.add(token))
    if not text.stopped:
        out.append(text.rest())
    ends = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
    _, cut = min(ends, default=(0, len(whole)))
    assert "".join(out) == whole[:cut], f"stops {stops}: {out}"


def test_of_two_stop_strings_in_one_token_the_one_that_is_complete_first_ends_the_text(chatty):
    pieces = {token: chatty.decode([token]) for token in range(300, chatty.vocab_size)}
    token, piece = next(item for item in pieces.items() if item[1].isalpha() and len(set(item[1])) == len(item[1]) > 2)
    for stops in ([piece[2], piece[1]], [piece[1], piece[2]]):
        text = StoppedText(chatty, stops)
        assert text.add(token) + text.rest() == piece[:1] and text.stopped


# What is refused


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"\xff\xfe{}", None, "not valid JSON in UTF-8"),
        (b"[" * 15_000, None, "nested too deeply"),
        (b"[]", None, "a JSON list"),
        (b'{"model": "tiny", "model": "x", "prompt": "a"}', None, "stands twice"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', None, "NaN"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', None, "larger than any"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', None, "surrogate"),
        ({}, "model", "model is None"),
        (dict(model=["tiny"], prompt="a"), "model", "a string is required"),
        (dict(model="tiny"), "prompt", "prompt is None"),
        (dict(model="tiny", prompt=7), "prompt", "prompt is 7"),
        (dict(model="tiny", prompt=["a", "b"]), "prompt", "one text"),
        (dict(model="tiny", prompt=[1, True]), "prompt", "token ids"),
        (dict(model="tiny", prompt=[]), "prompt", "at least one token"),
        (dict(model="tiny", prompt=[-1]), "prompt", "ids from 0 to"),
        (dict(model="tiny", prompt=[10**30]), "prompt", "ids from 0 to"),
        (dict(model="tiny", prompt="a", max_tokens=0), "max_tokens", "max_tokens is 0"),
        (dict(model="tiny", prompt="a", max_tokens=-5), "max_tokens", "max_tokens is -5"),
        (dict(model="tiny", prompt="a", max_tokens=2.5), "max_tokens", "max_tokens is 2.5"),
        (dict(model="tiny", prompt="a", max_tokens=41), "max_tokens", "at most 40"),
        (dict(model="tiny", prompt="a", temperature=-1), "temperature", "temperature is -1"),
        (dict(model="tiny", prompt="a", temperature="1"), "temperature", "temperature is '1'"),
        (dict(model="tiny", prompt="a", temperature=True), "temperature", "temperature is True"),
        (dict(model="tiny", prompt="a", top_p=0), "top_p", "top_p is 0"),
        (dict(model="tiny", prompt="a", top_k=0), "top_k", "top_k is 0"),
        (dict(model="tiny", prompt="a", seed=2**64), "seed", "seed is"),
        (dict(model="tiny", prompt="a", stop=[""]), "stop", "stop is"),
        (dict(model="tiny", prompt="a", stop={"a": 1}), "stop", "stop is"),
        (dict(model="tiny", prompt="a", stop=["x" * 2000]), "stop", "stop is"),
        (dict(model="tiny", prompt="a", stream="yes"), "stream", "stream is 'yes'"),
        (dict(model="tiny", prompt="a", stream_options=[]), "stream_options", "an object"),
    ],
)
def test_a_malformed_request_is_400_and_named(client, body, param, named):
    refused(client.post(COMPLETIONS, body), 400, named, param=param)


@pytest.mark.parametrize("field", [dict(n=2), dict(logprobs=5), dict(echo=True), dict(best_of=3), dict(whatever=1)])
def test_what_is_not_supported_is_named_and_what_asks_for_nothing_is_not(client, field):
    (name,) = field
    body = dict(model="tiny", prompt="a", **GREEDY)
    refused(client.post(COMPLETIONS, body | field), 400, name, param=name, code="unsupported_parameter")
    options = dict(stream_options={name: field[name]})
    refused(client.post(COMPLETIONS, body | options), 400, name, param=name, code="unsupported_parameter")
    for path in (LOAD, UNLOAD):
        fault = client.post(path, dict(lora_name="a", lora_path="skill-1") | field)
        refused(fault, 400, "not supported", param=name if path == LOAD else "lora_path", code="unsupported_parameter")
    nothing = dict(n=1, echo=False, presence_penalty=0, logit_bias={}, suffix=None, user="me", top_p=None)
    assert client.post(COMPLETIONS, body | nothing)[0] == 200


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hello", "messages"),
        ([{"role": "wizard", "content": "Hi"}], "messages[0]"),
        ([{"role": "user", "content": "Hi"}, {"role": "user"}], "messages[1]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0]"),
        ([{"role": ["user"], "content": "Hi"}], "messages[0]"),
        (["Hi"], "messages[0]"),
    ],
)
def test_messages_that_are_none_are_named(client, messages, param):
    refused(client.post(CHAT, dict(model="tiny", messages=messages)), 400, param=param)


def test_a_prompt_beyond_the_context_is_refused_and_one_that_just_fits_is_answered(client, chatty):
    room = LIMIT - 5
    body = dict(model="tiny", temperature=0)
    long, fits = [7] * (room + 1), [7] * room
    how = dict(param="prompt", code="context_length_exceeded")
    refused(client.post(COMPLETIONS, body | dict(prompt=long, max_tokens=5)), 400, f"{room + 1} tokens", **how)
    refused(client.post(COMPLETIONS, body | dict(prompt=[7] * LIMIT)), 400, f"end at {LIMIT}", **how)
    assert client.post(COMPLETIONS, body | dict(prompt=fits, max_tokens=5))[1]["usage"]["total_tokens"] == LIMIT
    assert client.post(COMPLETIONS, body | dict(prompt=[7] * (LIMIT - 1)))[1]["usage"]["completion_tokens"] <= 1
    assert client.post(COMPLETIONS, body | dict(prompt=""))[0] == 200, "the begin token alone is a prompt"
    messages = [{"role": "user", "content": "many words " * 200}]
    refused(client.post(CHAT, body | dict(messages=messages)), 400, param="messages", code="context_length_exceeded")


def test_other_refusals_have_their_status(client):
    body = dict(model="nobody", prompt="a")
    refused(client.post(COMPLETIONS, body), 404, "'nobody'", param="model", code="model_not_found")
    refused(client.send("GET", "/v1/models/nobody"), 404, "'nobody'", param="model", code="model_not_found")
    refused(client.post(COMPLETIONS, dict(model="tiny", prompt="a" * 30_000)), 413, "20000", code="body_too_large")
    chunks = (b"x" * 9000 for _ in range(4))  # no length announced
    refused(client.send("POST", COMPLETIONS, b"".join(chunks)), 413, "20000", code="body_too_large")
    refused(client.send("GET", COMPLETIONS), 405, "Method Not Allowed")
    refused(client.send("GET", "/v2"), 404, "/v2")
    refused(client.post(COMPLETIONS, b"{}", **{"Content-Type": "text/plain"}), 415, "application/json")
    assert client.send("GET", "/v1/models", Host="evil.example")[0] == 400


def test_json_may_be_said_with_a_charset_and_in_capitals(client):
    body = dict(model="tiny", prompt="a", **GREEDY)
    assert client.post(COMPLETIONS, body, **{"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


def test_an_adapter_that_goes_while_its_request_is_read_is_404(chatty, few, monkeypatch):
    with running(chatty, few) as (client, service):
        submit = service.engine.submit

        def late(*request, **sampling):
            service.engine.remove("skill-1").result(timeout=20)
            return submit(*request, **sampling)

        monkeypatch.setattr(service.engine, "submit", late)
        body = dict(model="skill-1", prompt="a", **GREEDY)
        refused(client.post(COMPLETIONS, body), 404, "'skill-1'", param="model", code="model_not_found")


def test_a_body_without_a_length_is_measured_as_it_comes(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    body = iter([b'{"model": "tiny", "prompt": "', *[b"a" * 5000] * 5])
    connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_length_beyond_the_limit_is_refused_before_anything_is_read(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
    connection.putrequest("POST", COMPLETIONS)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "20001")
    connection.endheaders()  # and no body
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(chatty):
    with running(chatty, patience=0.1) as (client, _):
        connection = client.raw(COMPLETIONS, {})
        connection.close()
        slow = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        slow.putrequest("POST", COMPLETIONS)
        slow.putheader("Content-Type", "application/json")
        slow.putheader("Content-Length", "10")
        slow.endheaders(b"{")
        assert slow.getresponse().status == 408
        slow.close()


def test_a_request_ends_at_the_tokenizer_s_ends_and_at_its_own(served, chatty):
    body = json.dumps(dict(model="tiny", prompt="a", stop_token_ids=[7])).encode()
    assert chatty.end_ids and read_request(served[1], body, chat=False).sampling["ends"] == chatty.end_ids | {7}


def test_a_prompt_s_virtual_tokens_take_room(served, monkeypatch):
    monkeypatch.setattr(served[1].bank, "virtual_tokens", lambda name: 100)
    for length in (LIMIT - 101, LIMIT - 100):
        body = json.dumps(dict(model="skill-1", prompt=[7] * length, max_tokens=1)).encode()
        if length < LIMIT - 100:
            read_request(served[1], body, chat=False)
        else:
            with pytest.raises(Refusal, match=f"end at {LIMIT - 100}"):
                read_request(served[1], body, chat=False)


def test_a_server_that_forces_loads_what_another_refuses(served, monkeypatch):
    _, service = served
    monkeypatch.setattr(service.engine, "add", lambda name, folder, force: force)
    monkeypatch.setattr(service, "force", True)
    assert service.load("new", "skill-1") is True


def test_an_adapter_that_is_being_moved_into_place_is_one(tmp_path):
    (tmp_path / WRITTEN).mkdir()
    assert not is_adapter(tmp_path)
    (tmp_path / WRITTEN / "adapter_config.json").write_text("{}")
    assert is_adapter(tmp_path)


def test_a_base_without_a_template_completes_and_does_not_chat(tokenizer):
    with running(tokenizer) as (client, _):
        messages = [{"role": "user", "content": "Hi"}]
        refused(client.post(CHAT, dict(model="tiny", messages=messages)), 400, "chat template", param="messages")
        assert client.post(COMPLETIONS, dict(model="tiny", prompt="Hi"))[0] == 200
        refused(client.post(LOAD, dict(lora_name="a", lora_path="a")), 400, "no folder of adapters")


# Adapters that come and go


def test_adapters_are_loaded_and_unloaded_while_it_runs(chatty, adapters, tmp_path, alone):
    folder = tmp_path / "adapters"
    shutil.copytree(adapters / "skill-0", folder / "one")
    shutil.copytree(adapters / "skill-1", tmp_path / "outside")
    with running(chatty, folder) as (client, service):
        shutil.copytree(adapters / "skill-2", folder / "two")
        body = dict(model="two", prompt="Once", **GREEDY)
        assert client.post(COMPLETIONS, body)[0] == 404
        for path in ("two", str(folder / "two")):
            assert client.post(LOAD, dict(lora_name="two", lora_path=path))[0] == 200
            assert client.post(COMPLETIONS, body)[1]["choices"][0]["text"] == alone("Once", "skill-2")[0]
            refused(client.post(LOAD, dict(lora_name="two", lora_path="two")), 400, "'two' already", param="lora_name")
            assert client.post(UNLOAD, dict(lora_name="two"))[0] == 200
            assert client.post(COMPLETIONS, body)[0] == 404
        refused(client.post(UNLOAD, dict(lora_name="two")), 404, "'two'", param="lora_name", code="model_not_found")
        refused(client.post(UNLOAD, dict(lora_name="tiny")), 400, "'tiny' is the base", param="lora_name")
        refused(client.post(LOAD, dict(lora_name="tiny", lora_path="two")), 400, "'tiny' already", param="lora_name")
        (folder / "link").symlink_to(tmp_path / "outside")
        for path in ("../outside", str(tmp_path / "outside"), "link", ".", "", "two/../..", "/", "a\0b"):
            answer = client.post(LOAD, dict(lora_name="out", lora_path=path))
            refused(answer, 400, "leads out of the server's folder", param="lora_path")
        refused(client.post(LOAD, dict(lora_name="out", lora_path="nothing")), 400, "nothing")
        refused(client.post(LOAD, dict(lora_name="a/b", lora_path="two")), 400, "'a/b' is not a name")
        refused(client.post(LOAD, dict(lora_name="out")), 400, param="lora_path")
        assert [model["id"] for model in service.models()] == ["tiny", "one"]
        assert client.post(COMPLETIONS, dict(model="one", prompt="Once", **GREEDY))[0] == 200


def test_of_loads_that_come_together_one_wins_and_none_is_replaced(chatty, adapters):
    with running(chatty, adapters) as (client, service):
        begun = hold(service, gate := threading.Event())
        body = dict(model="skill-1", prompt="Once", max_tokens=1)
        with ThreadPoolExecutor(4) as pool:
            answer = pool.submit(client.post, COMPLETIONS, body)
            until(lambda: begun)  # so that all loads come before any is made
            loads = [pool.submit(client.post, LOAD, dict(lora_name="a", lora_path=f"skill-{n}")) for n in (1, 2, 3)]
            until(lambda: len(service.engine.calls) == 3)
            gate.set()
            found = sorted((load.result() for load in loads), key=lambda each: each[0])
        assert [status for status, _ in found] == [200, 400, 400] and answer.result()[0] == 200
        refused(found[1], 400, "an adapter 'a' already")


def test_an_adapter_in_use_is_409_and_free_when_its_client_is_gone(chatty, few):
    with running(chatty, few, batch_size=1, max_new_tokens=LIMIT) as (client, service):
        hold(service)
        connection = client.raw(COMPLETIONS, dict(model="skill-1", prompt=[5], max_tokens=100, stream=True))
        until(lambda: service.engine.batch.rows)
        (row,) = service.engine.batch.rows
        refused(client.post(UNLOAD, dict(lora_name="skill-1")), 409, "in use", param="lora_name", code="adapter_in_use")
        connection.close()
        until(lambda: not service.engine.batch.rows)
        assert len(row.tokens) < 100, "the row ran on to its end"
        assert client.post(UNLOAD, dict(lora_name="skill-1"))[0] == 200


# Clients that go away, a queue that is full, an end in order


def hold(service, gate: threading.Event | None = None) -> list:
    """Makes each pass of the model take a while, or wait for the gate; the passes that were begun."""
    forward, begun = service.bank.model.model.forward, []

    def slow(ids, cache=None):
        begun.append(len(ids))
        time.sleep(0.02) if gate is None else gate.wait(timeout=30)
        return forward(ids, cache)

    service.bank.model.model.forward = slow
    return begun


def until(holds, seconds: float = 20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row_and_its_place_in_the_queue(chatty, few, alone, stream):
    with running(chatty, few, batch_size=1, max_new_tokens=LIMIT) as (client, service):
        hold(service)
        engine, body = service.engine, dict(model="skill-1", prompt=[5], max_tokens=150, stream=stream, temperature=0)
        first = client.raw(COMPLETIONS, body)
        until(lambda: engine.batch.rows)
        second = client.raw(COMPLETIONS, body)
        until(lambda: engine.waiting)
        if stream:
            assert b"200 OK" in first.recv(100)
        (row,) = engine.batch.rows
        second.close()
        until(lambda: not engine.waiting)
        assert engine.batch.rows == [row], "the first had its answer before the second's place was free"
        first.close()
        until(lambda: not engine.batch.rows)
        assert len(row.tokens) < 150, "the row ran on to its end"
        text = client.post(COMPLETIONS, dict(model="skill-2", prompt="Once", **GREEDY))[1]["choices"][0]["text"]
        assert text == alone("Once", "skill-2")[0]


def test_a_full_queue_is_429_and_the_shutting_down_503(chatty, few):
    with running(chatty, few, batch_size=1, max_queue=1, max_new_tokens=LIMIT) as (client, service):
        gate = threading.Event()
        begun = hold(service, gate)
        engine, body = service.engine, dict(model="skill-1", prompt=[5], max_tokens=5, temperature=0)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(client.post, COMPLETIONS, body)]
            until(lambda: begun)
            answers.append(pool.submit(client.post, COMPLETIONS, body))
            until(lambda: engine.waiting)
            status, error = client.post(COMPLETIONS, body)
            refused((status, error), 429, "1 requests wait", code="queue_full")
            assert error["error"]["type"] == "rate_limit_error"
            engine.refuse()
            refused(client.post(COMPLETIONS, body), 503, "shutting down", code="shutting_down")
            refused(client.post(UNLOAD, dict(lora_name="skill-3")), 503, "shutting down", code="shutting_down")
            gate.set()
            refused(answers[1].result(), 503, "shutting down", code="shutting_down")  # it waited
            assert client.send("GET", "/health")[1] == {"status": "closing"}
            assert answers[0].result()[0] == 200, "what runs goes on to its end"


def test_a_stream_that_is_cut_by_the_end_says_so(chatty):
    with running(chatty, max_new_tokens=LIMIT) as (client, service):
        hold(service)
        threading.Thread(target=lambda: (until(lambda: service.engine.batch.rows), service.engine.close())).start()
        body = dict(model="tiny", prompt=[5], max_tokens=150, temperature=0, stop=["\0"])
        events = client.events(COMPLETIONS, body)
        assert events[-1]["error"]["code"] == "shutting_down"


# Load


def test_two_hundred_requests_of_sixteen_adapters_get_the_answers_they_have_alone(served, alone):
    """None is lost while one client goes away and another sends what is no request."""
    client, service = served
    words = ["Once", "The old man", "It was a", "I", "What they said is that the"]
    asked = [(words[n % 5], f"skill-{n % 16}" if n % 17 else None, 2 + n % 9, bool(n % 2)) for n in range(200)]

    def ask(one) -> tuple[str, str]:
        prompt, adapter, new, stream = one
        body = dict(model=adapter or "tiny", prompt=prompt, max_tokens=new, temperature=0)
        if stream:
            choices = [event["choices"][0] for event in client.events(COMPLETIONS, body)]
            return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
        (choice,) = client.post(COMPLETIONS, body)[1]["choices"]
        return choice["text"], choice["finish_reason"]

    with ThreadPoolExecutor(40) as pool:
        answers = pool.map(ask, asked)
        client.raw(COMPLETIONS, dict(model="skill-3", prompt="Once", max_tokens=40, temperature=0)).close()
        refused(client.post(COMPLETIONS, b'{"model": "tiny"'), 400, "not valid JSON")
        answers = list(answers)
    known = {(p, a, n): alone(p, a, n) for p, a, n, _ in asked}
    wrong = [(one, answer) for one, answer in zip(asked, answers, strict=True) if answer != known[one[:3]]]
    assert not wrong, f"{len(wrong)} of 200 answers are not those that they have alone, the first {wrong[0]}"
    until(lambda: not service.engine.batch.rows and not service.engine.waiting)


# The process


def fails(capsys, *arguments) -> str:
    assert main(["serve", *map(str, arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def test_what_keeps_a_server_from_starting_is_one_sentence(base_folder, tmp_path, capsys, monkeypatch):
    base = ("--base", base_folder.directory, "--port", 0)
    assert "there is no folder" in fails(capsys, *base, "--adapters", tmp_path / "none")
    broken = tmp_path / "adapters" / "broken"
    broken.mkdir(parents=True)
    (broken / "adapter_config.json").write_text("{")
    assert str(broken) in fails(capsys, *base, "--adapters", tmp_path / "adapters")
    assert "is an adapter itself" in fails(capsys, *base, "--adapters", broken)
    broken.rename(tmp_path / "adapters" / base_folder.name)
    assert "called as the base" in fails(capsys, *base, "--adapters", tmp_path / "adapters")
    assert "cannot listen on 300.1.1.1" in fails(capsys, *base, "--host", "300.1.1.1")
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    assert "pip install starlette uvicorn" in fails(capsys, *base)


def test_a_name_that_two_models_would_have_is_refused_in_the_bank_too(chatty, tmp_path):
    write_adapters(tmp_path, chatty.vocab_size, 1)
    (tmp_path / "no adapter").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    bank = open_bank(a_base(chatty.vocab_size), "tiny", tmp_path)
    assert isinstance(bank, AdapterBank) and bank.names == ["skill-0"]


def test_an_interrupt_refuses_at_once_and_closes_after_the_grace(monkeypatch):
    said, closed = [], threading.Event()
    engine = SimpleNamespace(refusing=False, close=closed.set)
    engine.refuse = lambda: (said.append("refuse"), setattr(engine, "refusing", True))
    process = SimpleNamespace(handle_exit=lambda signal, frame: said.append(signal))
    monkeypatch.setattr(server, "GRACE", 0.01)
    server.ending(process, engine)
    process.handle_exit(2, None)
    assert said == ["refuse", 2] and closed.wait(timeout=20)
    process.handle_exit(15, None)
    assert said == ["refuse", 2, 15]


@pytest.mark.skipif(sys.platform == "win32", reason="an interrupt is sent as a signal")
def test_the_command_serves_and_an_interrupt_ends_it_in_order(base_folder):
    command = [sys.executable, "-m", "minilora", "serve", "--base", str(base_folder.directory), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        said = process.stderr.readline()
        assert "and 0 adapters at http://127.0.0.1:" in said
        port = int(said.split("127.0.0.1:")[1].split("/")[0])
        body = dict(model=base_folder.name, prompt="The", max_tokens=4)
        assert Client(port).post(COMPLETIONS, body)[0] == 200
        assert Client(port).send("GET", "/health", Host="evil.example")[0] == 400
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
