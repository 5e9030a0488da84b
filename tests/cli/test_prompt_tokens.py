"""Prompts of programming problems end where a token of prompt and answer together ends."""

import pytest
from parscale_core.evaluation.problems import read_problems
from parscale_core.evaluation.prompt_tokens import cut_prompt
from test_evaluate import HUMANEVAL, MBPP, write_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

CODE = [
    'def f(a):\n    """A sum."""\n    return a + 1\n\n\n"""\nWhat?\n"""\ndef g():\n    x\n'
] * 20


def qwen():
    """Trained anew, with Qwen2's way of cutting: a docstring's end and the line's are one token."""
    return Qwen2Tokenizer().train_new_from_iterator(CODE, vocab_size=400)


def gpt2():
    """As GPT-2 cuts, and SmolLM2: the line's end belongs to the indentation after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CODE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def begins_with_start():
    """With a token of its own before every text, as Llama's have."""
    tokenizer = gpt2()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.bos_token_id

    class Starting:
        def encode(self, text):
            return [start, *tokenizer.encode(text)]

        def decode(self, ids, **options):
            return tokenizer.decode(ids, **options)

    return Starting()


PROMPT = 'def f(a):\n    """The sum é."""\n'


@pytest.mark.parametrize(
    ("make", "prompt", "likely", "expected"),
    [
        (qwen, PROMPT, "    return x", PROMPT),
        (gpt2, PROMPT, "    return x", PROMPT.rstrip()),
        (begins_with_start, PROMPT, "    return x", PROMPT.rstrip()),
        (qwen, '"""\nWhat?\n"""\n', "def f(x):", '"""\nWhat?\n"""\n'),
        (gpt2, '"""\nWhat?\n"""\n', "def f(x):", '"""\nWhat?\n"""\n'),
        # Without the line's end in the prompt, a model has to write all of the joined token.
        (qwen, PROMPT.rstrip(), "\n    return x", PROMPT.rstrip()[:-3]),
    ],
)
def test_where_a_prompt_ends(make, prompt, likely, expected):
    tokenizer = make()
    ids, text = cut_prompt(tokenizer, prompt, likely)
    whole = tokenizer.encode(prompt + likely)
    assert whole[: len(ids)] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert prompt.startswith(text) and text.rstrip('. "') == expected.rstrip('. "')
    # There is no longer one: the next token of both together reaches beyond the prompt.
    longer = tokenizer.decode(whole[: len(ids) + 1], skip_special_tokens=True)
    assert not prompt.startswith(longer)
    if make is not qwen or prompt.endswith("\n"):
        assert text == expected


def test_the_vocabularies_are_what_they_are_said_to_be():
    assert '"""Ċ' in qwen().get_vocab() or '."""Ċ' in qwen().get_vocab()
    assert any(token.startswith("ĊĠ") for token in gpt2().get_vocab())


@pytest.mark.parametrize("make", [qwen, gpt2])
@pytest.mark.parametrize(("values", "key"), [(HUMANEVAL, "canonical_solution"), (MBPP, "code")])
def test_the_program_is_the_same_however_a_prompt_was_cut(tmp_path, make, values, key):
    for problem, value in zip(
        read_problems(write_lines(tmp_path / "p.jsonl", values)), values, strict=True
    ):
        _, text = cut_prompt(make(), problem.prompt, problem.likely)
        answer = (problem.prompt + value[key])[len(text) :]
        completion = problem.completion(text + answer)
        assert completion == "\n" + value[key]


@pytest.mark.parametrize("given", ["def two():", "def two(): ", "def two():\n    ", "x\n\n"])
def test_local_problems_that_end_otherwise(tmp_path, given):
    (problem,) = read_problems(
        write_lines(tmp_path / "p.jsonl", [HUMANEVAL[1] | {"prompt": given}])
    )
    for make in (qwen, gpt2):
        ids, text = cut_prompt(make(), problem.prompt, problem.likely)
        assert ids and problem.prompt.startswith(text)
    assert problem.before == given.rstrip()
