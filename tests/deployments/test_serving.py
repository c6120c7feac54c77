"""One replica and the real openai client: answers, streams, usage, concurrency, disconnects."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.deployments.conftest import MODEL, AppFactory, ServedApp

PROMPT = "the quick brown fox"
CONTEXT = 512


@pytest.fixture(scope="module")
def app(run_app: AppFactory) -> ServedApp:
    return run_app()


def completion(app: ServedApp, **fields: Any) -> Any:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **fields}
    return app.client().completions.create(**body)


def streamed(app: ServedApp, **fields: Any) -> tuple[list[str], list[Any]]:
    """The text of every choice, and all chunks."""
    chunks = list(completion(app, stream=True, **fields))
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return [texts[index] for index in sorted(texts)], chunks


def wait_idle(app: ServedApp, seconds: float = 5.0) -> None:
    """Returns once no replica holds a block; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        loads = [replica.load for replica in app.replicas()]
        if all(load.free_kv_tokens == load.total_kv_tokens for load in loads):
            return
        time.sleep(0.05)
    pytest.fail(f"blocks are still held: {loads}")


def test_completion(app: ServedApp) -> None:
    prompt = "what no other test asks"
    answer = completion(app, prompt=prompt)
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == len(prompt)  # one token a byte
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_usage_counts_rounds(app: ServedApp) -> None:
    counts = completion(app).usage.model_extra["magicdec"]
    assert counts["rounds"] > 0
    assert counts["drafted"] >= counts["accepted"] > 0
    mean = 1 + counts["accepted"] / counts["rounds"]
    assert counts["mean_acceptance_length"] == pytest.approx(mean, abs=1e-4)


def test_stream_equals_whole(app: ServedApp) -> None:
    whole = completion(app)
    texts, chunks = streamed(app, stream_options={"include_usage": True})
    assert texts == [whole.choices[0].text]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason


def test_chat(app: ServedApp) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    body: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0}
    client = app.client().chat.completions
    whole = client.create(**body, max_completion_tokens=20)
    assert whole.choices[0].message.role == "assistant"
    template = "system: be brief\nuser: hello\nassistant: "
    assert whole.usage.prompt_tokens == len(template)
    chunks = list(client.create(**body, max_tokens=20, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"


def test_chat_without_max_tokens_may_fill_the_context(app: ServedApp) -> None:
    answer = app.client().chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 450}]}],
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.total_tokens == CONTEXT


def test_list_and_token_id_prompts(app: ServedApp) -> None:
    one = completion(app, prompt="abc").choices[0].text
    other = completion(app, prompt="hello").choices[0].text
    both = completion(app, prompt=["abc", "hello"])
    assert [c.index for c in both.choices] == [0, 1]
    assert [c.text for c in both.choices] == [one, other]
    assert both.usage.prompt_tokens == len("abc") + len("hello")
    ids = tokens("abc")
    assert completion(app, prompt=ids).choices[0].text == one
    texts, _ = streamed(app, prompt=[ids, tokens("hello")])
    assert texts == [one, other]


def tokens(text: str) -> list[int]:
    """The byte tokenizer's ids: printable ASCII starts at its place in the sorted alphabet."""
    return [ord(c) - ord("!") for c in text]


def test_stop_string_ends_before_it(app: ServedApp) -> None:
    text = completion(app, max_tokens=40).choices[0].text
    stop = text[10:12]
    answer = completion(app, max_tokens=40, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]
    texts, _ = streamed(app, max_tokens=40, stop=[stop, "never said"])
    assert texts == [answer.choices[0].text]


def test_seeds_reproduce(app: ServedApp) -> None:
    def sample(**fields: Any) -> list[int]:
        extra = {"return_token_ids": True, "ignore_eos": True}
        answer = completion(app, temperature=1.0, extra_body=extra, **fields)
        ids: list[int] = answer.choices[0].model_extra["token_ids"]
        return ids

    assert sample(seed=7) == sample(seed=7)
    assert sample(seed=7) != sample(seed=8)
    assert sample() != sample()


def test_one_chunk_a_round(app: ServedApp) -> None:
    extra = {"return_token_ids": True, "ignore_eos": True}
    _, chunks = streamed(
        app, max_tokens=48, extra_body=extra, stream_options={"include_usage": True}
    )
    rounds = chunks[-1].usage.model_extra["magicdec"]["rounds"]
    # The first token comes from the prefill, which is not a round.
    assert rounds <= len(chunks) - 1 <= rounds + 1
    emitted = [t for c in chunks[:-1] for t in c.choices[0].model_extra["token_ids"]]
    assert len(emitted) == 48


def test_keep_alive_comments_while_waiting(app: ServedApp) -> None:
    prompts = [f"{i:02}" + "x" * 478 for i in range(12)]  # of different prefixes: nothing is cached
    with ThreadPoolExecutor(12) as pool:
        busy = [pool.submit(completion, app, prompt=prompt) for prompt in prompts[1:]]
        body = {"model": MODEL, "prompt": prompts[0], "max_tokens": 4, "stream": True}
        lines = pool.submit(_lines, app, body).result()
        for request in busy:
            request.result()
    assert ": keep-alive" in lines
    assert [line for line in lines if line][-1] == "data: [DONE]"


def _lines(app: ServedApp, body: dict[str, Any]) -> list[str]:
    with httpx.stream("POST", f"{app.url}/v1/completions", json=body, timeout=60) as response:
        return list(response.iter_lines())


def test_models_and_health(app: ServedApp) -> None:
    assert [model.id for model in app.client().models.list()] == [MODEL]
    assert httpx.get(f"{app.url}/health").json() == {"status": "ok", "replicas": 1}


def test_request_id_is_echoed(app: ServedApp) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    headers = {"x-request-id": "from-the-client"}
    response = httpx.post(f"{app.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert response.headers["x-request-id"] == "from-the-client"


def test_sixteen_clients_get_what_one_gets(app: ServedApp) -> None:
    def ask(number: int) -> str:
        prompt = f"client {number} asks " * (1 + number % 5)
        fields: dict[str, Any] = {"prompt": prompt, "seed": number, "temperature": 0.8}
        if number % 2:
            return streamed(app, **fields)[0][0]
        text: str = completion(app, **fields).choices[0].text
        return text

    alone = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == alone
    wait_idle(app)


@pytest.mark.parametrize("chat", [False, True])
def test_disconnect_frees_the_cache(app: ServedApp, chat: bool) -> None:
    """A whole answer may take less time than it takes to look: then another one is asked for."""
    wait_idle(app)
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 480, "ignore_eos": True, "stream": True}
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    path = "chat/completions" if chat else "completions"
    for _ in range(5):
        with httpx.stream("POST", f"{app.url}/v1/{path}", json={**body, **prompt}) as response:
            next(response.iter_lines())
            was_running = app.replicas()[0].load.num_running == 1
        wait_idle(app, seconds=2.0)
        if was_running:
            return
    pytest.fail("no answer was seen running")


def test_disconnect_of_a_waiting_client_frees_the_cache(app: ServedApp) -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{app.url}/v1/completions", json=body, timeout=0.5)
    wait_idle(app, seconds=2.0)


def test_error_in_the_openai_client(app: ServedApp) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        completion(app, prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    assert "512" in caught.value.message and "600" in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        app.client().completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
