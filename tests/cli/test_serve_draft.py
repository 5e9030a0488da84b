"""``parscale serve --draft-model``: the same answers, drafted by another model."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

from parscale_mlx.load import load_draft

import pytest
from helpers.serving import CHAT, TEXT, chat, post, serving
from helpers.tiny_models import error_line, write_tokenizer


@pytest.fixture(scope="module", params=["tiny:p1", "tiny:p2", "the model itself"])
def server(request, opened, model):
    """Drafts that are seldom right, now and then, and always."""
    draft = request.param if ":" in request.param else load_draft(model, opened[1])
    with serving(opened, draft=draft) as server:
        yield server


def details(answer) -> tuple[list[int], int]:
    """An answer's tokens, and how many of its prompt's were cached."""
    body = answer.json()
    tokens = [token["id"] for token in body["choices"][0]["parscale_streams"]]
    return tokens, body["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("drafted", [None, 1, 2, 7])
def test_a_draft_changes_no_answer(server, reference, drafted):
    for streams in (4, 2, 1):
        for length in (1, 2, 9):
            body = chat("Hi", model=f"tiny:p{streams}", max_tokens=length, num_draft_tokens=drafted)
            answer = post(server, CHAT, body)
            assert answer.text() == reference.chat("Hi", length, streams)
            assert answer.json()["usage"]["completion_tokens"] == length


def test_a_stream_comes_in_pieces(server, reference):
    answer = post(server, CHAT, chat("Hello!", max_tokens=10, stream=True))
    choices = [chunk["choices"][0] for chunk in answer.chunks()]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == reference.chat("Hello!", 10) and len(choices) > 5
    assert choices[-1]["finish_reason"] == "length"


def test_caches_of_both_models_hold_what_they_are_said_to(server, reference):
    """Answers end anywhere in a draft, and the next prompt begins with all or part of them."""
    for length in range(1, 6):
        prompt = reference.tokenizer.encode(f"Tell me a story about{length}")
        tokens: list[int] = []
        for _ in range(3):
            body = {"prompt": prompt, "max_tokens": length, "stream_weights": True}
            answer = post(server, TEXT, body)
            tokens, cached = details(answer)
            assert answer.text() == reference.goes_on(prompt, length)
            expected = reference.weights(prompt, tokens, 4)
            for token, weights in zip(
                answer.json()["choices"][0]["parscale_streams"], expected, strict=True
            ):
                assert token["weights"] == pytest.approx(weights, abs=1e-4)
            prompt = prompt + tokens
        assert cached >= len(prompt) - 2 * length - 2
        other = prompt[: -length - 1] + [reference.tokenizer.encode("x")[-1]] * 3
        assert post(server, TEXT, body | {"prompt": other}).text() == reference.goes_on(
            other, length
        )


def test_stop_strings_and_the_end_of_text(server, reference):
    whole = reference.chat("stop", n=8)
    stop = whole[len(whole) // 2 - 3 : len(whole) // 2 + 4]
    for _ in range(2):
        answer = post(server, CHAT, chat("stop", stop=stop))
        assert answer.text() == whole[: whole.index(stop)]
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
    ended = post(server, CHAT, chat("stop", logit_bias={"319": 100}))
    assert ended.text() == "" and ended.json()["choices"][0]["finish_reason"] == "stop"


def test_logprobs_seeds_and_penalties(server, opened):
    bodies = [
        chat("Hi", max_tokens=6, logprobs=True, top_logprobs=2),
        chat("Hi", max_tokens=9, repetition_penalty=1.5, presence_penalty=0.5),
        chat("Hi", max_tokens=3, logit_bias={"200": 100}),
    ]
    with serving(opened) as plain:
        for body in bodies:
            expected, answer = (
                post(each, CHAT, body).json()["choices"][0] for each in (plain, server)
            )
            for choice in (expected, answer):
                for token in (choice.get("logprobs") or {}).get("content", []):
                    token["logprob"] = round(token["logprob"], 3)
                    for top in token["top_logprobs"]:
                        top["logprob"] = round(top["logprob"], 3)
            assert answer == expected
    body = chat("Hi", max_tokens=12, temperature=1.0)
    texts = [post(server, CHAT, body | {"seed": seed}).text() for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_a_request_picks_its_draft(server, reference):
    for fields in ({"draft_model": "tiny:p2"}, {"draft_model": "tiny:p4"}, {"num_draft_tokens": 0}):
        assert post(server, CHAT, chat("Hi", **fields)).text() == reference.chat("Hi")
    answer = post(server, CHAT, chat("Hi", draft_model="tiny:p3"))
    assert answer.status == 400 and "tiny:p4" in answer.error()
    answer = post(server, CHAT, chat("Hi", num_draft_tokens=65))
    assert answer.status == 400 and "64" in answer.error()


def test_requests_with_and_without_a_draft_take_turns(server, reference):
    def ask(n: int) -> tuple[str, str]:
        streams, text = (4, 2, 1)[n % 3], f"turn {n}"
        body = chat(text, model=f"tiny:p{streams}", num_draft_tokens=n % 2 * 3)
        return post(server, CHAT, body).text(), reference.chat(text, streams=streams)

    with ThreadPoolExecutor(8) as pool:
        for got, expected in pool.map(ask, range(12)):
            assert got == expected


def test_drafts_that_no_command_can_use(parscale, backbone, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    write_tokenizer(other, size=319)
    run = ("serve", "--model", backbone, "--draft-model")
    assert "vocabulary of 319 tokens is not the model's of 320" in error_line(parscale(*run, other))
    # As many tokens, but others.
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["word200"], words["word201"] = words["word201"], words["word200"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "--draft-model" in error_line(parscale(*run, other))
    assert "nowhere" in error_line(parscale(*run, tmp_path / "nowhere"))
