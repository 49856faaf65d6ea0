"""The server under load, asked by OpenAI's own client: every answer the one it has alone, and none lost.

python -m pytest tests/parity/test_openai_client.py -s        # prints latencies and tokens a second
"""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from serving_client import TEMPLATE, a_base, running, text_alone, write_adapters  # noqa: E402

from minilora import load_model  # noqa: E402
from minilora.adapters.inject import adapter_parameters, apply_lora, remove_lora  # noqa: E402
from minilora.config import LoRAConfig  # noqa: E402
from minilora.serving.service import open_bank  # noqa: E402
from minilora.storage.adapters import save_adapter  # noqa: E402
from minilora.storage.get import MODELS  # noqa: E402
from minilora.text.tokenizer import open_tokenizer  # noqa: E402

SMOLLM2 = MODELS / "smollm2"
REQUESTS, ADAPTERS, CLIENTS = 200, 16, 32
QUESTIONS = ["Who are you?", "Name three towns.", "What is 2 + 2?", "Tell me a story about a fox and a crow.", "Why?"]


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def world(request, tokenizer, tmp_path_factory):
    """A tokenizer, a base and a function that makes it again, and a folder of adapters."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        write_adapters(folder / "adapters", tokenizer.vocab_size, ADAPTERS)
        return open_tokenizer(folder), lambda: a_base(tokenizer.vocab_size), folder / "adapters"
    if not SMOLLM2.is_dir():
        pytest.skip("python -m minilora get smollm2 has not been run")
    model = load_model(SMOLLM2, dtype=torch.float32)
    for number in range(ADAPTERS):
        lora = apply_lora(model, LoRAConfig(8, 16, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapter_parameters(lora):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        save_adapter(lora, folder / "adapters" / f"skill-{number}")
        remove_lora(lora)
    return open_tokenizer(SMOLLM2), lambda: load_model(SMOLLM2, dtype=torch.float32), folder / "adapters"


def test_two_hundred_requests_over_sixteen_adapters(world):
    """Chats and completions, whole and streamed, while one client goes away and one request is malformed."""
    tokenizer, make_base, folder = world
    asked = []
    for n in range(REQUESTS):
        adapter = f"skill-{n % ADAPTERS}" if n % 17 else None
        asked.append((QUESTIONS[n % 5], adapter, 4 + 4 * (n % 5), n % 2 == 0, n % 3 == 0))
    with running(tokenizer, folder, batch_size=16, model=make_base(), max_queue=REQUESTS) as (raw, service):
        address = f"http://127.0.0.1:{raw.port}/v1"
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
        names = {model.id for model in client.models.list()}
        assert names == {"tiny", *(f"skill-{n}" for n in range(ADAPTERS))}

        def ask(one):
            began = time.perf_counter()
            return *answer_of(client, *one), time.perf_counter() - began

        with ThreadPoolExecutor(CLIENTS) as pool:
            start = time.perf_counter()
            answers = pool.map(ask, asked)
            raw.raw("/v1/completions", dict(model="skill-3", prompt="Once", max_tokens=100, stream=True)).close()
            with pytest.raises(openai.BadRequestError, match="max_tokens is -1"):
                client.completions.create(model="skill-1", prompt="Once", max_tokens=-1)
            with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
                client.completions.create(model="nobody", prompt="Once")
            answers = list(answers)
            seconds = time.perf_counter() - start
        end = time.monotonic() + 60
        while service.engine.batch.rows and time.monotonic() < end:
            time.sleep(0.01)
        assert not service.engine.batch.rows and not service.engine.waiting, "a row is left"

    bank, known = open_bank(make_base(), "tiny", folder), {}
    for question, adapter, new, chat, _ in asked:
        prompt = [{"role": "user", "content": question}] if chat else question
        if (question, adapter, new, chat) not in known:
            known[question, adapter, new, chat] = text_alone(bank, tokenizer, prompt, adapter, new)
    wrong = [(one, got[:2]) for one, got in zip(asked, answers, strict=True) if got[:2] != known[one[:4]]]
    tokens, times = sum(got[2] for got in answers), sorted(got[3] for got in answers)
    half, most, all_but_one = (times[int(part * (len(times) - 1))] for part in (0.5, 0.9, 0.99))
    print(f"\n{len(answers)} answers, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens a second; "
          f"latency p50 {half:.2f} s, p90 {most:.2f} s, p99 {all_but_one:.2f} s; {len(wrong)} differ")  # fmt: skip
    assert not wrong, f"{len(wrong)} of {REQUESTS} answers are not those that they have alone, the first {wrong[0]}"


def answer_of(client, question: str, adapter: str | None, new: int, chat: bool, stream: bool) -> tuple[str, str, int]:
    """Text, the reason for its end, and its tokens, by OpenAI's client."""
    how = dict(model=adapter or "tiny", max_tokens=new, temperature=0)
    if chat:
        create, how = client.chat.completions.create, how | {"messages": [{"role": "user", "content": question}]}
    else:
        create, how = client.completions.create, how | {"prompt": question}
    if not stream:
        answer = create(**how)
        (choice,) = answer.choices
        text = choice.message.content if chat else choice.text
        return text, choice.finish_reason, answer.usage.completion_tokens
    text, reason, count = "", None, None
    for chunk in create(**how, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += (choice.delta.content or "") if chat else choice.text
            reason = choice.finish_reason or reason
        count = chunk.usage.completion_tokens if chunk.usage else count
    return text, reason, count
