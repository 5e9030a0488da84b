"""What generation takes of mlx-lm: a test for each line of ``parscale_mlx.engine.mlx_lm_parts``.

CI runs this file and the engine's tests with the oldest and the newest mlx-lm that pyproject.toml
allows.
"""

import re
from importlib.metadata import version
from pathlib import Path

from parscale_mlx.engine import mlx_lm_parts as parts

import mlx.core as mx
import pytest
from helpers.byte_tokenizers import BYTES
from helpers.golden_cases import load_golden
from mlx_lm.convert import QUANT_RECIPES
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from parscale_core.convert_settings import MIXED

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="module")
def case():
    return load_golden("p2-tied-sharded")


def drain(generator, count: int) -> dict[int, list]:
    """Responses by row, over ``count`` steps."""
    found: dict[int, list] = {}
    for _ in range(count):
        for response in generator.next()[1]:
            found.setdefault(response.uid, []).append(response)
    return found


def test_the_installed_version_is_one_that_is_declared():
    declared = re.findall(r'"(mlx-lm[<>=][^;"]*)', PYPROJECT.read_text())
    (bounds,) = {str(Requirement(line).specifier) for line in declared}
    assert re.search(r"<\d", bounds)
    assert Version(version("mlx-lm")) in SpecifierSet(bounds)


def test_a_batch_gives_each_row_its_own_sampler_and_processors_once_a_token(case):
    first, second = case.rows[:2]
    called: dict[int, list[int]] = {0: [], 1: []}

    def processor(row: int):
        def note(tokens, logits):
            assert logits.shape[0] == 1
            called[row].append(tokens.shape[0])
            return logits

        return note

    def never(logprobs):
        return mx.full((logprobs.shape[0],), 7, mx.uint32)

    generator = parts.BatchGenerator(case.model, completion_batch_size=4, prefill_batch_size=4)
    uids = generator.insert(
        [first.ids, second.ids],
        [3, 3],
        caches=[case.model.make_cache(), case.model.make_cache()],
        all_tokens=[[], []],
        samplers=[None, never],
        logits_processors=[[processor(0)], [processor(1)]],
    )
    found = drain(generator, 12)
    generator.close()
    assert [r.token for r in found[uids[0]]] == first.greedy_tokens[:3]
    assert [r.token for r in found[uids[1]]] == [7, 7, 7]
    for row, ids in enumerate((first.ids, second.ids)):
        assert called[row][:3] == [len(ids), len(ids) + 1, len(ids) + 2]
    last = found[uids[0]][-1]
    assert last.finish_reason == "length"
    assert last.all_tokens == first.ids + first.greedy_tokens[:3]
    prefix = case.model.args.prefix_length
    assert last.prompt_cache[0].offset == prefix + len(last.all_tokens)
    assert last.logprobs.shape == (case.model.args.vocab_size,)


def test_a_row_that_is_removed_gives_its_caches_back(case):
    row = case.rows[0]
    generator = parts.BatchGenerator(case.model)
    (uid,) = generator.insert([row.ids], [50], caches=[case.model.make_cache()])
    while not generator.next()[1]:
        pass
    caches, tokens = generator.remove([uid], return_prompt_caches=True)[uid]
    assert tokens[: len(row.ids)] == row.ids
    assert caches[0].offset == case.model.args.prefix_length + len(tokens)
    rest = row.greedy_tokens[len(tokens) - len(row.ids) - 1 :]
    (uid,) = generator.insert([[rest[0]]], [3], caches=[trimmed(caches)], all_tokens=[tokens[:-1]])
    assert [r.token for r in drain(generator, 8)[uid]] == rest[1:4]
    generator.close()


def trimmed(caches: list) -> list:
    assert parts.can_trim_prompt_cache(caches)
    parts.trim_prompt_cache(caches, 1)
    return caches


@pytest.mark.parametrize("draft", [False, True])
def test_generators_go_on_from_caches_that_are_given(case, draft):
    row = case.rows[0]
    with mx.stream(parts.generation_stream):
        caches = case.model.make_cache()
        drafts = case.model.make_cache() if draft else []
        for own in filter(None, (caches, drafts)):
            case.model(mx.array([row.ids[:-1]]), cache=own)
    options = {"max_tokens": 6, "prompt_cache": caches + drafts, "logits_processors": []}
    options |= {"kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 0, "sampler": None}
    last = mx.array(row.ids[-1:], mx.uint32)
    if draft:
        steps = list(parts.speculative_generate_step(
            last, case.model, case.model, num_draft_tokens=2, **options
        ))  # fmt: skip
        assert any(step[2] for step in steps)
    else:
        steps = list(parts.generate_step(last, case.model, **options))
    assert [step[0] for step in steps] == row.greedy_tokens[:6]


def test_quantising_in_place():
    caches = load_golden("p1").model.make_cache()
    keys = mx.zeros((1, 2, 3, 64))
    caches[0].update_and_fetch(keys, keys)
    parts.maybe_quantize_kv_cache(caches[:1], 10, 64, 8)
    assert not hasattr(caches[0], "bits")
    one = caches[:1]
    parts.maybe_quantize_kv_cache(one, 3, 64, 8)
    assert (one[0].bits, one[0].offset) == (8, 3)


def test_kept_caches_by_their_longest_common_beginning(case):
    store = parts.LRUPromptCache(2, 1 << 40)
    ids = case.rows[0].ids
    caches = case.model.make_cache()
    case.model(mx.array([ids]), cache=caches)
    store.insert_cache("key", ids, caches)
    found, rest = store.fetch_nearest_cache("key", [*ids, 5, 6])
    assert rest == [5, 6] and found[0].offset == caches[0].offset and found is not caches
    assert store.fetch_nearest_cache("other", ids) == (None, ids)
    assert len(store) == 1 and store.nbytes > 0


def test_caches_in_a_file(case, tmp_path):
    caches = case.model.make_cache()
    case.model(mx.array([case.rows[0].ids]), cache=caches)
    file = str(tmp_path / "c.safetensors")
    parts.save_prompt_cache(file, caches, {"a": "b"})
    loaded, metadata = parts.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"a": "b"} and loaded[0].offset == caches[0].offset


def test_penalties_of_given_tokens():
    processors = parts.make_logits_processors({3: 1.0}, 2.0, 5, None, 5, 0.5, 5)
    tokens, logits = mx.array([1, 2, 2]), mx.array([[4.0, 4.0, 4.0, 4.0]])
    for processor in processors:
        logits = processor(tokens, logits)
    assert logits.tolist() == [[4.0, 1.5, 1.0, 5.0]]


def test_wired_limit_does_nothing_without_a_gpu(case):
    with parts.wired_limit(case.model, [parts.generation_stream]):
        pass


def test_the_tokenizer_in_the_wrapper():
    wrapper = parts.TokenizerWrapper(BYTES, eos_token_ids=[5, 6])
    tokenizer, ends = parts.unwrapped(wrapper)
    # Newer versions add the tokenizer's own.
    assert tokenizer is BYTES and {5, 6} <= ends <= {5, 6, BYTES.eos_token_id}
    assert parts.unwrapped(BYTES) == (BYTES, frozenset({BYTES.eos_token_id}))


def test_recipes_are_mlx_lms():
    assert set(MIXED) == set(QUANT_RECIPES)
