"""``parscale serve`` as its clients see it: the official client, and what it says of streams."""

from concurrent.futures import ThreadPoolExecutor

from parscale_mlx.load import open_models

import mlx.core as mx
import openai
import pytest
from helpers.serving import CHAT, TEXT, chat, post, request, serving

HI = [{"role": "user", "content": "Hi"}]


def test_streams_share_the_backbone(opened):
    models = opened[0]
    for streams in (2, 4):
        own, shared = models[streams].layers[0], models[1].layers[0]
        assert own.self_attn.q_proj is shared.self_attn.q_proj and own.mlp is shared.mlp
        assert models[streams].model.embed_tokens is models[1].model.embed_tokens


def test_models_are_listed(client):
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:p1", "tiny:p2", "tiny:p4"]
    assert client.models.retrieve("tiny:p2").id == "tiny:p2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tiny:p3")


def test_the_model_field_picks_the_streams(client, server, reference):
    texts = {}
    for streams in (1, 2, 4):
        answer = client.chat.completions.create(
            model=f"tiny:p{streams}", messages=HI, max_tokens=8, temperature=0
        )
        texts[streams] = answer.choices[0].message.content
        assert texts[streams] == reference.chat("Hi", streams=streams)
        assert answer.model == f"tiny:p{streams}"
        assert answer.choices[0].finish_reason == "length"
    assert len(set(texts.values())) == 3
    for fields in ({}, {"model": "tiny"}, {"model": "default_model"}, {"model": None}):
        answer = post(server, CHAT, chat("Hi", **fields))
        assert answer.text() == texts[4] and answer.json()["model"] == "tiny:p4"


def test_usage_counts_the_prompt_and_what_was_cached(client, reference):
    question = [{"role": "user", "content": "count these tokens"}]
    runs = [
        client.chat.completions.create(model="tiny", messages=question, max_tokens=5).usage
        for _ in range(2)
    ]
    for usage in runs:
        assert usage.prompt_tokens == len(reference.ids("count these tokens"))
        assert usage.completion_tokens == 5
        assert usage.total_tokens == usage.prompt_tokens + 5
    assert runs[1].prompt_tokens_details.cached_tokens == runs[1].prompt_tokens - 1


def test_a_stream_is_the_answer_in_pieces(client, reference):
    stream = client.chat.completions.create(
        model="tiny:p2",
        messages=HI,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(p.delta.content or "" for p in pieces) == reference.chat("Hi", streams=2)
    assert sum(bool(p.delta.content) for p in pieces) > 4
    assert pieces[-1].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 8


def test_completions_take_text_and_tokens(client, reference):
    ids = reference.tokenizer.encode("abcd")
    expected = reference.goes_on(ids, 6)
    for prompt in ("abcd", ["abcd"], ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6)
        assert answer.choices[0].text == expected


def test_a_completion_keeps_the_space_it_begins_with(server, reference):
    space = reference.tokenizer.convert_tokens_to_ids("Ġ")
    body = {"prompt": "abcd", "max_tokens": 2, "logit_bias": {str(space): 100}}
    assert post(server, TEXT, body).text() == "  "


def test_a_prompt_whose_cache_holds_all_of_it(client, reference):
    # An answer's tokens are cached after those of its prompt: together they are the next prompt.
    for seed in (openai.omit, 1):
        prompt = reference.tokenizer.encode(f"abcdefgh{seed}")
        for _ in range(3):
            answer = client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=6,
                temperature=0,
                seed=seed,
                extra_body={"stream_weights": True},
            )
            assert answer.choices[0].text == reference.goes_on(prompt, 6)
            prompt += [token["id"] for token in answer.choices[0].parscale_streams]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_found_in_the_text(server, reference, seed, stream):
    whole = reference.chat("stop", n=8)
    # It begins and ends amid tokens, so no sequence of tokens is it.
    stop = whole[len(whole) // 2 - 3 : len(whole) // 2 + 4]
    body = chat("stop", stop=["never said", stop], stream=stream)
    answer = post(server, CHAT, body | ({"seed": seed, "temperature": 0} if seed else {}))
    if stream:
        choices = [chunk["choices"][0] for chunk in answer.chunks()]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        reason = choices[-1]["finish_reason"]
    else:
        text, reason = answer.text(), answer.json()["choices"][0]["finish_reason"]
        assert answer.json()["usage"]["completion_tokens"] < 8
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_what_could_begin_a_stop_string_is_not_lost(server, reference):
    whole = reference.chat("stop", n=8)
    answer = post(server, CHAT, chat("stop", stop=whole[-3:] + "and more"))
    assert answer.text() == whole


def test_seeds_repeat_an_answer(server):
    body = chat("seeds", max_tokens=12, temperature=1.5)
    texts = [post(server, CHAT, body | {"seed": seed}).text() for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("penalty", ["repetition", "presence", "frequency"])
def test_penalties_know_what_the_prompt_cache_holds(server, reference, penalty, seed):
    word = reference.tokenizer.convert_tokens_to_ids("word200")
    body = {"prompt": [word, *range(10, 19)], "max_tokens": 1, "temperature": 0, "seed": seed}
    body |= {"logit_bias": {str(word): 40}, f"{penalty}_penalty": 100}
    for size, said in ((0, False), (10, False), (3, True)):
        for _ in range(2):
            answer = post(server, TEXT, body | {f"{penalty}_context_size": size})
            assert (answer.text() == "word200") == said


def test_a_seed_says_all_of_an_answer(server, reference):
    body = {
        "prompt": "Once upon a time there was a tiny model",
        "max_tokens": 10,
        "temperature": 0.5,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "seed": 999,
        "stop": "never said",
    }
    answers = [post(server, TEXT, body) for _ in range(2)]
    assert answers[0].text() == answers[1].text() != ""
    cached = [a.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert cached == [0, len(reference.tokenizer.encode(body["prompt"])) - 1]


def test_logprobs_are_those_of_the_model(client, reference):
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    ids, model = reference.ids("Hi"), reference.models[4]
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        logits = model(mx.array([ids]))[0, -1]
        expected = logits - mx.logsumexp(logits)
        best = sorted(range(320), key=expected.tolist().__getitem__, reverse=True)[:3]
        assert [top.id for top in entry.top_logprobs] == best
        assert abs(entry.logprob - expected[entry.id].item()) < 1e-3
        ids.append(entry.id)
    old = client.completions.create(model="tiny", prompt="abcd", max_tokens=4, logprobs=2)
    assert len(old.choices[0].logprobs.tokens) == 4
    assert all(len(top) == 2 for top in old.choices[0].logprobs.top_logprobs)


def test_logit_bias_and_penalties(server, reference):
    word = reference.tokenizer.convert_tokens_to_ids("word200")
    answer = post(server, CHAT, chat("Hi", max_tokens=3, logit_bias={str(word): 100}))
    assert answer.text() == "word200" * 3
    plain = post(server, CHAT, chat("Hi", max_tokens=60)).text()
    penalised = chat("Hi", max_tokens=60, repetition_penalty=1.8, frequency_penalty=1.0)
    assert post(server, CHAT, penalised).text() != plain


def test_a_message_in_parts_is_their_text(server, reference):
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    body = chat("") | {"messages": [{"role": "user", "content": parts}]}
    assert post(server, CHAT, body).text() == reference.chat("in parts")


def test_a_conversation_reuses_what_it_began_with(server, reference):
    first = post(server, CHAT, chat("Tell me a story about"))
    second = post(server, CHAT, chat("Tell me a story about dragons"))
    assert first.text() == reference.chat("Tell me a story about")
    assert second.text() == reference.chat("Tell me a story about dragons")
    cached = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= len(reference.ids("Tell me a story about")) - len(reference.ids(""))


@pytest.mark.parametrize("seed", [None, 3])
def test_a_stream_lives_while_its_prompt_is_read(server, seed):
    text = f"a long prompt {seed}"
    answer = post(server, CHAT, chat(text, stream=True, seed=seed))
    before = answer.body.decode().partition("data: ")[0].split("\n\n")
    assert len(before) > 1
    assert all(line.startswith(": keepalive ") for line in before if line)
    assert b"keepalive" not in post(server, CHAT, chat(text, seed=seed)).body


def test_messages_of_parts_and_of_tools(server):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "what is 2+3?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": 2}'}}
            ],
        },
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    assert post(server, CHAT, {"messages": messages, "max_tokens": 3}).status == 200


def spoken(answer, *, stream: bool) -> list[dict]:
    """The tokens of an answer with their streams' weights."""
    if not stream:
        return answer.json()["choices"][0]["parscale_streams"]
    return [t for chunk in answer.chunks() for t in chunk["choices"][0]["parscale_streams"]]


@pytest.mark.parametrize("seed", [None, 7])
def test_stream_weights_of_one_answer(server, reference, seed):
    body = chat("alone", stream_weights=True, temperature=0) | ({"seed": seed} if seed else {})
    tokens = spoken(post(server, CHAT, body), stream=False)
    expected = reference.weights(reference.ids("alone"), [t["id"] for t in tokens], 4)
    assert len(tokens) == 8
    for token, weights in zip(tokens, expected, strict=True):
        assert token["weights"] == pytest.approx(weights, abs=1e-4)
    assert post(server, CHAT, chat("alone")).json()["choices"][0].get("parscale_streams") is None


def test_stream_weights_of_every_row_of_a_batch(server, reference):
    """Answers of different lengths come and go, of two models, and each row keeps its own."""

    def ask(n: int):
        streams, length = (4, 2, 4)[n % 3], 3 + 5 * n % 17
        text = "question " + "abcdefgh"[n % 8] * (1 + 3 * n)
        body = chat(text, model=f"tiny:p{streams}", max_tokens=length, stream=bool(n % 2))
        answer = post(server, CHAT, body | {"stream_weights": n != 4})
        return n, streams, length, text, answer

    with ThreadPoolExecutor(12) as pool:
        for n, streams, length, text, answer in pool.map(ask, range(12)):
            assert answer.status == 200
            if n == 4:
                continue
            tokens = spoken(answer, stream=bool(n % 2))
            assert len(tokens) == length
            assert "".join(t["text"] for t in tokens) == reference.chat(text, length, streams)
            expected = reference.weights(reference.ids(text), [t["id"] for t in tokens], streams)
            for token, weights in zip(tokens, expected, strict=True):
                assert token["weights"] == pytest.approx(weights, abs=1e-4)


def test_the_page_is_whole_and_asks_nobody_else(server):
    answer = request(server, "GET", "/")
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/html")
    assert b"http://" not in answer.body and b"https://" not in answer.body
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_model_without_a_chat_template(plain_model):
    with serving(open_models(plain_model, []), name="plain") as server:
        assert [m["id"] for m in request(server, "GET", "/v1/models").json()["data"]] == [
            "plain",
            "plain:p1",
        ]
        assert post(server, CHAT, chat("Hi")).status == 200
        assert post(server, TEXT, {"prompt": "Hi", "max_tokens": 2}).status == 200
