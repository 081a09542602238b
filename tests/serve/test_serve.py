"""Serving: OpenAI's own client over real sockets against every kind of model, and everything that goes wrong there."""

import concurrent.futures
import doctest
import http.client
import json
import socket
import threading
from pathlib import Path

import pytest

starlette = pytest.importorskip("starlette", reason="starlette is not installed: `make setup` installs it")
openai = pytest.importorskip("openai", reason="openai is not installed: `make setup` installs it")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: `make setup` installs it")

from served import KEY, PATIENCE_S, never_ending, serving, wait_for  # noqa: E402

import helpers.serve  # noqa: E402
from helpers import cli, inference  # noqa: E402
from helpers.models import TINY, profile  # noqa: E402
from helpers.serve import asked, text  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [f"Which animal does {name} keep?" for name in ("Edith", "Otto", "Ida", "Bruno", "Greta", "Anton")]
FOLDERS, ALL = ["merged", "adapter", "gptq"], ["merged", "adapter", "gptq", "gguf"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory, gptq_model):
    """One model of each kind: merged, an adapter that says something else than its base, GPTQ, GGUF."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    model.save_pretrained(root / "adapter")
    command = ["export", "--profile", "tiny", "--model", str(TINY), "--type", "f16"]
    assert cli.main([*command, "--output", str(root / "tiny.gguf")]) == 0
    return {"merged": TINY, "adapter": root / "adapter", "gptq": gptq_model, "gguf": root / "tiny.gguf"}


@pytest.fixture(scope="module")
def served(paths):
    with serving([f"{name}={path}" for name, path in paths.items()]) as here:
        here.client = openai.OpenAI(base_url=here.address + "/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S)
        yield here


@pytest.fixture(scope="module")
def alone(paths):
    """Model -> question -> greedy answer of 12 tokens, written by itself without a server; GGUF's of the same model."""
    answers = {}
    for name in FOLDERS:
        loaded = inference.load(paths[name], profile("tiny"))
        messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
        said = inference.batch_generate(loaded, messages, 12)
        answers[name] = dict(zip(QUESTIONS, (one.text.strip() for one in said), strict=True))
    return answers | {"gguf": answers["merged"]}


def ask(served, model, question=QUESTIONS[0], **settings):
    messages = [{"role": "user", "content": question}]
    settings = {"max_tokens": 12, "temperature": 0} | settings
    return served.client.chat.completions.create(model=model, messages=messages, **settings)


@pytest.mark.parametrize("module", [helpers.serve, asked, text])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("model", ALL)
def test_a_chat_is_answered_as_without_a_server(served, alone, model):
    for question in QUESTIONS[:3]:
        answer = ask(served, model, question)
        assert answer.choices[0].message.content.strip() == alone[model][question]
        assert answer.choices[0].finish_reason == "length" and answer.model == model
        assert answer.usage.completion_tokens == 12
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12 > 20
    assert alone["adapter"] != alone["merged"]


@pytest.mark.parametrize("model", ALL)
def test_a_stream_says_the_same_in_pieces_with_its_counts(served, alone, model):
    chunks = list(ask(served, model, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces).strip() == alone[model][QUESTIONS[0]]
    assert sum(map(bool, pieces)) > 5
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length" and not any(reasons[:-1])
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_word_ends_the_answer_and_is_not_part_of_it(served, alone, model, stream):
    whole = alone[model][QUESTIONS[0]]
    stop = whole[5:8]  # across two tokens as a rule
    answer = ask(served, model, stop=["never said", stop], stream=stream)
    chunks = list(answer) if stream else []
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks) if stream else None
    said = answer.choices[0].message.content if said is None else said
    reason = chunks[-1].choices[0].finish_reason if stream else answer.choices[0].finish_reason
    assert said.strip() == whole[: whole.index(stop)].strip() and reason == "stop"


@pytest.mark.parametrize("model", ALL)
def test_text_is_continued_without_a_template(served, model):
    answer = served.client.completions.create(model=model, prompt="Edith keeps a", max_tokens=6, temperature=0)
    assert answer.choices[0].text.strip() and answer.usage.completion_tokens == 6


def test_models_are_listed_and_found_by_name(served, paths):
    assert [model.id for model in served.client.models.list()] == list(paths)
    assert served.client.models.retrieve("gptq").context_length == 512


@pytest.mark.parametrize("model", ALL)
def test_what_cannot_be_answered_is_openais_error_with_its_status(served, model):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here") as error:
        ask(served, "gpt-4")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context") as error:
        ask(served, model, "a very long story " * 400)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="messages is missing or empty"):
        served.client.chat.completions.create(model=model, messages=[])
    with pytest.raises(openai.BadRequestError):
        served.client.chat.completions.create(model=model, messages=[{"role": "nobody", "content": "Hi"}] * 2)
    assert ask(served, model, max_tokens=1).choices[0].finish_reason == "length"


def test_a_wrong_key_or_none_is_refused_everywhere_but_at_health(served):
    for key in ("wrong", KEY + "x"):
        other = served.client.with_options(api_key=key)
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            other.models.list()
        with pytest.raises(openai.AuthenticationError):
            other.chat.completions.create(model="merged", messages=[{"role": "user", "content": "Hi"}])
    assert raw(served, "GET", "/health", key=None)[0] == 200
    assert raw(served, "GET", "/v1/models", key=None)[0] == 401
    assert raw(served, "GET", "/v1/models/merged", key=None)[0] == 401


def raw(served, method, path, body=None, key=KEY, kind="application/json"):
    """(status, JSON) of a request without any client's help."""
    connection = http.client.HTTPConnection(served.address.removeprefix("http://"), timeout=PATIENCE_S)
    headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"{not json", "application/json", 400, "not JSON"),
        (b"[" * 10**6, "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "not a JSON object"),
        (b'{"model": "merged", "messages": [{"role": "user", "content": "\\ud83d"}]}', "application/json", 400, "half"),
        (b"{}", "application/json", 400, "model is missing"),
        (b"{}", "text/plain", 415, "send JSON"),
        (b" " * (5 * 2**20), "application/json", 413, "4 MiB"),
        ({"n": 2}, "application/json", 400, "n is not served"),
        ({"logprobs": True}, "application/json", 400, "logprobs is not served"),
        ({"temperature": 9}, "application/json", 400, "temperature: "),
        ({"max_tokens": 0}, "application/json", 400, "max_tokens: "),
        ({"stop": ["a"] * 9}, "application/json", 400, "stop: "),
        ({"stop": ""}, "application/json", 400, "stop: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "application/json", 400, "messages"),
    ],
)
def test_a_request_that_is_wrong_is_told_what_is_wrong(served, body, kind, status, said):
    if isinstance(body, dict):
        body = json.dumps({"model": "merged", "messages": [{"role": "user", "content": "Hi"}]} | body)
    found, answer = raw(served, "POST", "/v1/chat/completions", body, kind=kind)
    assert found == status and said in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_paths_that_are_not_served_are_errors_of_the_same_shape(served):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/", 404)):
        found, answer = raw(served, method, path)
        assert found == status and answer["error"]["code"] == "unknown_url"


def test_a_full_house_says_come_again_and_takes_the_next_when_one_left(served, monkeypatch):
    monkeypatch.setattr(served.places, "most", 1)
    never_ending(served.models["merged"].engine, monkeypatch)
    held = ask(served, "merged", stream=True, max_tokens=400)
    next(iter(held))
    with pytest.raises(openai.RateLimitError, match="1 requests are being answered"):
        ask(served, "merged")
    held.close()
    wait_for(lambda: served.places.taken == 0)
    assert ask(served, "gptq", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_leaves_nothing_running(served, model, stream, monkeypatch):
    cancelled, count = [], served.places.served
    engine = served.models[model].engine if model != "gguf" else None
    if engine:
        never_ending(engine, monkeypatch)
        before = engine.manager.cancel_request
        monkeypatch.setattr(engine.manager, "cancel_request", lambda name: (cancelled.append(name), before(name)))
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 490, "stream": stream}
    wire = socket.create_connection(served.address.removeprefix("http://").split(":"))
    data = json.dumps(body | {"temperature": 0}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    wire.sendall(head.encode() + data)
    if stream:
        while b"data: " not in wire.recv(4096):
            pass
    else:
        wait_for(lambda: served.places.served > count)
        wait_for(lambda: engine is None or engine.listeners)
    wire.close()
    wait_for(lambda: served.places.taken == 0)
    if engine:
        assert len(cancelled) == 1 and not engine.listeners
        wait_for(lambda: not engine.manager.batch_processor.has_pending_requests())


@pytest.mark.parametrize("model", ["merged", "gptq", "gguf"])
def test_streams_at_the_same_time_say_what_each_says_alone(served, alone, model):
    def one(number):
        chunks = ask(served, model, QUESTIONS[number % len(QUESTIONS)], stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        said = list(pool.map(one, range(32)))
    assert said == [alone[model][QUESTIONS[number % len(QUESTIONS)]] for number in range(32)]
    wait_for(lambda: served.places.taken == 0)


@pytest.mark.parametrize("model", FOLDERS)
def test_each_request_has_its_own_temperature(served, alone, model):
    def one(temperature):
        return ask(served, model, temperature=temperature, max_tokens=12).choices[0].message.content.strip()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        said = list(pool.map(one, [0, 2, 0, 2, 0, 2]))
    assert set(said[::2]) == {alone[model][QUESTIONS[0]]}
    assert len(set(said[1::2])) > 1 and not set(said[1::2]) & set(said[::2])


def test_many_requests_leave_nothing_behind(served):
    engine = served.models["merged"].engine
    for _ in range(60):
        ask(served, "merged", max_tokens=1)
    assert not engine.listeners and engine.manager.output_router.output_queue.empty()
    wait_for(lambda: not engine.manager.batch_processor.has_pending_requests())


def test_a_loop_that_dies_tells_who_waits_and_ends_the_server_with_a_reason(paths, monkeypatch):
    said = []

    def ready(server, address):
        engine = server.config.app.state.models["merged"].engine
        monkeypatch.setattr(engine.manager, "_generation_step", lambda: 1 / 0)

        def ask_it():
            client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
            with pytest.raises(openai.InternalServerError) as error:
                client.chat.completions.create(model="merged", messages=[{"role": "user", "content": "Hi"}])
            said.append(str(error.value))

        threading.Thread(target=ask_it).start()

    with pytest.raises(RuntimeError, match="merged stopped while it answered"):
        helpers.serve.serve([f"merged={paths['merged']}"], profile("tiny"), port=0, ready=ready)
    assert "division by zero" in said[0]
