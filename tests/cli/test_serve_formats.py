"""What clients ask for: OpenAI's and Anthropic's own packages, JSON, several answers."""

import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from parscale_mlx.load import open_models

import anthropic
import openai
import pytest
from helpers.serving import CHAT, TEXT, chat, post, raw, raw_post, request, serving
from pydantic import BaseModel

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


# OpenAI's chat


def test_openais_stream_helper_accumulates_the_answer(client, reference):
    options = {"include_usage": True}
    arguments = dict(model="tiny", messages=HI, max_tokens=6, stream_options=options)
    with client.chat.completions.stream(**arguments) as stream:
        for _ in stream:
            pass
        whole = stream.current_completion_snapshot
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == reference.chat("Hi", 6)
    assert whole.usage.completion_tokens == 6


def test_only_the_first_delta_has_a_role(server):
    body = chat("Hi", stream=True, n=2, stream_options={"include_usage": True})
    *chunks, usage = post(server, CHAT, body).chunks()
    for index in (0, 1):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [choice["delta"].get("role") for choice in choices[:2]] == ["assistant", None]
        assert all("role" not in choice["delta"] for choice in choices[1:])
    assert {chunk["object"] for chunk in chunks} == {usage["object"]} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_and_several_prompts(server, reference, stream):
    prompts = ["abcd", "efgh ijkl"]
    body = {"prompt": prompts, "n": 2, "max_tokens": 5, "stream": stream}
    answer = post(server, TEXT, body)
    texts = ["", "", "", ""]
    if stream:
        for chunk in answer.chunks():
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in choices]
        lengths = [len(reference.tokenizer.encode(prompt)) for prompt in prompts]
        assert answer.json()["usage"]["prompt_tokens"] == sum(lengths)
        assert answer.json()["usage"]["completion_tokens"] == 20
    expected = [reference.goes_on(reference.tokenizer.encode(prompt), 5) for prompt in prompts]
    assert texts == [expected[0]] * 2 + [expected[1]] * 2


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63, 2**64 - 1])
def test_any_seed_of_64_bits(server, seed):
    body = chat("seeds", n=2, temperature=1.5, seed=seed)
    runs = [post(server, CHAT, body).json()["choices"] for _ in range(2)]
    texts = [[choice["message"]["content"] for choice in run] for run in runs]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


def test_twenty_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=2, logprobs=True, top_logprobs=20
    )
    for token in answer.choices[0].logprobs.content:
        assert len({top.id for top in token.top_logprobs}) == 20
        assert sorted(token.top_logprobs, key=lambda t: -t.logprob) == token.top_logprobs
    old = client.completions.create(model="tiny", prompt="ab", max_tokens=2, logprobs=20)
    assert all(len(top) == 20 for top in old.choices[0].logprobs.top_logprobs)


def test_parts_of_characters_are_told_by_their_bytes(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "bytes")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = {n: word for word, n in tokenizer["model"]["vocab"].items()}
    # "ä" is the bytes C3 A4, "å" is C3 A5; byte-level vocabularies write them so.
    words |= {200: "Ã", 201: "¤", 202: "¥"}
    tokenizer["model"]["vocab"] = {word: n for n, word in words.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with serving(open_models(folder, [])) as server:
        bias = {"200": 100}
        body = {"prompt": "Hi", "max_tokens": 2, "logit_bias": bias, "logprobs": True}
        tokens = post(server, TEXT, body).json()["choices"][0]["logprobs"]["content"]
        assert [(t["token"], t["bytes"]) for t in tokens] == [("bytes:\\xc3", [0xC3])] * 2
        old = post(server, TEXT, body | {"logprobs": 20}).json()["choices"][0]["logprobs"]
        assert old["tokens"] == ["bytes:\\xc3"] * 2
        assert all(len(top) == 20 for top in old["top_logprobs"])


def test_roles_and_null_content(server):
    developer = chat("Hi") | {"messages": [{"role": "developer", "content": "Be brief."}, *HI]}
    system = chat("Hi") | {"messages": [{"role": "system", "content": "Be brief."}, *HI]}
    assert post(server, CHAT, developer).text() == post(server, CHAT, system).text()
    null, empty = ({"messages": [{"role": "user", "content": c}, *HI]} for c in (None, ""))
    assert post(server, CHAT, chat("") | null).text() == post(server, CHAT, chat("") | empty).text()


def test_tools_that_no_template_takes_and_calls_that_do_not_parse(opened, model, tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    folder = shutil.copytree(model, tmp_path / "tools")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] += "{% if tools %}{{ tools[0].function.name }}{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = {n: word for word, n in tokenizer["model"]["vocab"].items()}
    words |= {200: "<tool_call>{not", 201: "ĠJSON</tool_call>"}
    tokenizer["model"]["vocab"] = {word: n for n, word in words.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    bias = {"200": 99, "201": 99, "319": -100}
    with serving(open_models(folder, [])) as server:
        body = chat("Hi", max_tokens=9, tools=[tool], logit_bias=bias)
        choice = post(server, CHAT, body).json()["choices"][0]
        text = choice["message"]["content"]
        assert "<tool_call>{not" in text and "tool_calls" not in choice["message"]
        plain = post(server, CHAT, body | {"tool_choice": "none"}).json()["choices"][0]
        assert plain["message"]["content"]
        chunks = post(server, CHAT, body | {"stream": True}).chunks()
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
        raw_text = post(server, TEXT, {"prompt": "x", "max_tokens": 3, "logit_bias": bias}).text()
        assert "<tool_call>{not" in raw_text
        for fields in ({"functions": [tool["function"]]}, {"tool_choice": "required"}):
            assert post(server, CHAT, chat("Hi", **fields)).status == 400


# JSON


class Person(BaseModel):
    name: str
    age: int


def test_structured_output(client, server, reference):
    # OpenAI's package raises where the limit cut the answer.
    with suppress(openai.LengthFinishReasonError):
        answer = client.chat.completions.parse(
            model="tiny", messages=HI, response_format=Person, max_tokens=60, temperature=0
        )
        assert isinstance(answer.choices[0].message.parsed, Person)
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "count": {"enum": [1, 2, 3]}},
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}

    def ask(n: int):
        text = f"mixed {n}"
        if n % 2:
            return post(server, CHAT, chat(text)).text() == reference.chat(text)
        answer = post(server, CHAT, chat(text, max_tokens=100, response_format=form, temperature=1))
        value = json.loads(answer.text())
        return value["kind"] in ("a", "b") and value["count"] in (1, 2, 3)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(12)))
    body = chat("Hi", max_tokens=60, response_format={"type": "json_object"}, temperature=0)
    choice = post(server, CHAT, body).json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


# OpenAI's responses


def test_responses(client, reference):
    answer = client.responses.create(model="tiny", input="Hi", max_output_tokens=8)
    assert answer.output_text == reference.chat("Hi")
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 8 and answer.usage.total_tokens > 8
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    again = client.responses.create(model="tiny", input=parts, max_output_tokens=8)
    assert again.output_text == answer.output_text


def test_responses_as_events(client, reference):
    kinds, text = [], ""
    with client.responses.stream(model="tiny", input="Hi", max_output_tokens=8) as stream:
        for number, event in enumerate(stream):
            kinds.append(event.type)
            assert event.sequence_number == number
            if event.type == "response.output_text.delta":
                text += event.delta
    assert text == reference.chat("Hi")
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    whole = client.responses.create(model="tiny", input="Hi", max_output_tokens=8, stream=True)
    assert list(whole)[-1].response.output[0].content[0].text == text


def test_responses_store_nothing(client):
    for fields in ({"previous_response_id": "resp_1"}, {"store": True}, {"background": True}):
        with pytest.raises(openai.BadRequestError, match=next(iter(fields))):
            client.responses.create(model="tiny", input="Hi", **fields)


def test_structured_responses(client):
    form = {"type": "json_schema", "name": "person", "schema": Person.model_json_schema()}
    answer = client.responses.create(
        model="tiny", input="Hi", text={"format": form}, max_output_tokens=60
    )
    if answer.status == "completed":
        Person.model_validate_json(answer.output_text)
    assert answer.output_text.startswith('{"name": "')


# Anthropic's messages


def test_messages(claude, reference):
    answer = claude.messages.create(model="tiny", max_tokens=8, messages=HI)
    assert answer.content[0].text == reference.chat("Hi")
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 8)
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(reference.ids("Hi"))
    with claude.messages.stream(model="tiny", max_tokens=8, messages=HI) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == reference.chat("Hi")
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 8


def test_messages_are_counted(claude, reference):
    counted = claude.messages.count_tokens(model="tiny", messages=HI)
    assert counted.input_tokens == len(reference.ids("Hi"))
    counted = claude.messages.count_tokens(model="tiny", messages=HI, system="Be brief.")
    answer = claude.messages.create(model="tiny", max_tokens=1, messages=HI, system="Be brief.")
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.count_tokens(model="claude", messages=HI)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.count_tokens(model="tiny", messages=HI, extra_body={"max_tokens": 1})


def test_messages_stop_and_go_on(claude, reference):
    whole = reference.chat("stop", n=8)
    stop = whole[len(whole) // 2 - 3 : len(whole) // 2 + 4]
    answer = claude.messages.create(
        model="tiny",
        max_tokens=8,
        messages=[{"role": "user", "content": "stop"}],
        stop_sequences=["never said", stop],
    )
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == whole[: whole.index(stop)]
    begun = [*HI, {"role": "assistant", "content": "Well"}]
    answer = claude.messages.create(model="tiny", max_tokens=4, messages=begun)
    ids = reference.tokenizer.encode("<|user|>Hi\n<|assistant|>Well", add_special_tokens=False)
    assert answer.content[0].text == reference.text(ids, 4)


def test_messages_errors_are_anthropics(claude, opened):
    with pytest.raises(anthropic.NotFoundError, match="tiny:p4") as error:
        claude.messages.create(model="claude", max_tokens=8, messages=HI)
    assert error.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="tiny", max_tokens=0, messages=HI)
    with serving(opened, api_key="s3cret") as server:
        for key, fails in (("s3cret", False), ("wrong", True)):
            other = anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)
            if fails:
                with pytest.raises(anthropic.AuthenticationError):
                    other.messages.create(model="tiny", max_tokens=1, messages=HI)
            else:
                other.messages.create(model="tiny", max_tokens=1, messages=HI)


# HTTP


def test_head_docs_and_chunked_bodies(server, reference):
    for path in ("/", "/health", "/v1/models", "/metrics"):
        got, head = request(server, "GET", path), request(server, "HEAD", path)
        assert (head.status, head.body) == (got.status, b"")
        if path != "/metrics":
            assert head.headers["Content-Length"] == got.headers["Content-Length"]
    page = request(server, "GET", "/docs").body.decode()
    assert "http://" not in page and "https://" not in page
    document = request(server, "GET", "/openapi.json").json()
    assert {CHAT, TEXT, RESPONSES, MESSAGES} <= set(document["paths"])
    assert "ChatRequest" in document["components"]["schemas"]
    data = json.dumps(chat("Hi")).encode()
    parts = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (data[:9], data[9:])) + b"0\r\n\r\n"
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" % CHAT.encode()
    with raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + parts) as connection:
        answer = connection.makefile("rb").read()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == (
        reference.chat("Hi")
    )


def test_a_half_closed_client_gets_its_answer(server, reference):
    for stream in (False, True):
        body = chat("Hi", max_tokens=60, stream=stream)
        with raw(server, raw_post(CHAT, body)) as connection:
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        if stream:
            assert b"data: [DONE]" in answer
        else:
            text = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]
            assert text == reference.chat("Hi", 60)


def test_keys_and_preflights(opened, caplog):
    caplog.set_level("INFO", "parscale")
    options = dict(api_key="s3cret", allowed_origins=("https://good.example",))
    with serving(opened, **options) as server:
        for scheme in ("bearer", "BEARER", "Bearer"):
            key = {"Authorization": f"{scheme} s3cret"}
            assert request(server, "GET", "/v1/models", headers=key).status == 200
        asked = {
            "Origin": "https://good.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, x-stainless-os",
        }
        answer = request(server, "OPTIONS", CHAT, headers=asked)
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
        caplog.clear()
        assert post(server, CHAT, chat("Hi"), {"Origin": "https://evil.example"}).status == 403
        assert post(server, CHAT, chat("Hi"), {"Host": "evil.example"}).status == 403
    refused = [record for record in caplog.records if " 403 " in record.getMessage()]
    assert len(refused) == 2 and not any(record.exc_info for record in caplog.records)


def test_a_long_prompt_keeps_nobody_waiting(opened, reference):
    with serving(opened, max_request_bytes=4 << 20) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(post, server, CHAT, chat("long " * 100_000))
        while not long.done():
            assert request(server, "GET", "/health").status == 200
            assert post(server, CHAT, chat("Hi", max_tokens=2)).text() == reference.chat("Hi", 2)
        assert long.result().json()["error"]["code"] == "context_length_exceeded"


def test_drafts_from_the_prompt_and_quantised_caches(opened, reference):
    with serving(opened, draft="ngram") as server:
        for text in ("Hi", "again and again and again"):
            assert post(server, CHAT, chat(text, max_tokens=20)).text() == reference.chat(text, 20)
        off = chat("Hi", num_draft_tokens=0)
        assert post(server, CHAT, off).text() == reference.chat("Hi")
