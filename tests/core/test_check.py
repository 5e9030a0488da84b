"""What an engine is asked for and cannot do is refused before the work."""

from types import SimpleNamespace

import numpy as np
import pytest
from parscale_core.engine import Request, Sampling, check
from parscale_core.engine.logprobs import told

ENGINE = SimpleNamespace(
    vocab_size=100,
    context_length=10,
    streams=(4, 2),
    gives_stream_weights=False,
    drafts=("ngram",),
    end_tokens={99},
)


def test_a_fair_request_passes():
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=2**64 - 1, logit_bias={99: -100.0})
    check(Request([0, 99], streams=2, sampling=sampling, logprobs=20, draft="ngram"), ENGINE)


@pytest.mark.parametrize(
    "request_",
    [
        Request([]),
        Request([100]),
        Request([-1]),
        Request([1] * 10),
        Request([1], streams=8),
        Request([1], logprobs=21),
        Request([1], stream_weights=True),
        Request([1], draft="model"),
        Request([1], draft="ngram", num_draft_tokens=0),
        Request([1], grammar="{}", ignore_end=True),
        *(
            Request([1], sampling=Sampling(**field))
            for field in [
                {"top_p": 0.0},
                {"top_p": float("nan")},
                {"temperature": float("inf")},
                {"temperature": -1.0},
                {"max_tokens": 0},
                {"seed": 2**64},
                {"min_p": 1.5},
                {"repetition_penalty": 0.0},
                {"logit_bias": {100: 1.0}},
                {"logit_bias": {1: float("nan")}},
            ]
        ),
    ],
)
def test_refused(request_):
    with pytest.raises(ValueError):
        check(request_, ENGINE)


def test_logprobs_are_those_of_a_softmax():
    logits = np.array([1.0, 3.0, 2.0, 3.0], np.float32)
    expected = np.log(np.exp(logits) / np.exp(logits).sum())
    logprob, top = told(logits + 7, 2, 3)
    assert logprob == pytest.approx(expected[2])
    assert [entry.token for entry in top] == [1, 3, 2]
    assert [entry.logprob for entry in top] == pytest.approx([expected[n] for n in (1, 3, 2)])
    assert told(logits, 0, 0)[1] == () and len(told(logits, 0, 20)[1]) == 4
