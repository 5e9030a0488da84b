"""What the tests have every rank of a ring do; each returns plain data."""

import os
import signal
import sys
import time
from pathlib import Path

from parscale_mlx import Model
from parscale_mlx.load import load, load_model
from parscale_mlx.parallel.ranks import all_gather, check_same, join
from parscale_mlx.parallel.shard import Parallel, plan, shard_model
from parscale_mlx.parallel.traffic import sent_bytes, traffic_of_a_token
from parscale_mlx.parallel.watch import watched

import huggingface_hub
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.utils import quantize_model
from parscale_core.checkpoint.config import ModelConfig

from helpers.golden_cases import GOLDEN, difference, read_rows

RANDOM = dict(
    model_type="llama",
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    parscale_n=4,
    parscale_n_tokens=8,
)


def load_share(folder: Path, mode: str, dtype=mx.float32):
    model, _ = load_model(folder, dtype=dtype, lazy=True)
    shard_model(model, plan(mode, join(), model.args))
    mx.eval(model.parameters())
    return model


def follow_golden(case: str, mode: str, rows: int, tokens: int) -> list[dict]:
    """Greedy tokens of a golden case, and how far whole forward passes are from its logits."""
    with watched(join()):
        model = load_share(GOLDEN / case, mode)
        found = []
        for row in read_rows(GOLDEN / case)[:rows]:
            steps = generate_step(
                mx.array(row.ids),
                model,
                max_tokens=tokens,
                prefill_step_size=5,
                sampler=model.parallel.sampler(None),
            )
            greedy = [token for token, _ in steps]
            whole = difference(model(mx.array([row.ids]))[0], row.logits)
            found.append({"greedy": greedy == row.greedy_tokens[:tokens], "difference": whole})
    return found


def share_random_model(mode: str, bits: int, changes: dict) -> tuple[float, str]:
    """How far a shared model's logits are from the whole one's; or what its sharing raises."""
    with watched(join()):
        mx.random.seed(3)
        model = Model(ModelConfig.from_dict(RANDOM | changes))
        model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.1, model.parameters()))
        if bits:
            quantize_model(model, {}, 32, bits)
        mx.eval(model.parameters())
        ids = mx.array([[5, 17, 42], [9, 3, 64]])
        whole = model(ids)
        mx.eval(whole)
        try:
            shard_model(model, plan(mode, join(), model.args))
        except ValueError as error:
            return 0.0, str(error)
        cache = model.make_cache()
        far = max(difference(model(ids), whole), difference(model(ids, cache=cache), whole))
        return far / mx.abs(whole).max().item(), ""


def sizes(model) -> dict[str, int]:
    """Bytes of a model's caches, and of its prefixes and the rest of its layers."""
    weights = dict(tree_flatten([layer.parameters() for layer in model.layers]))
    prefixes = sum(value.nbytes for name, value in weights.items() if "prefix" in name)
    return {
        "caches": sum(cache.nbytes for cache in model.make_cache()),
        "prefixes": prefixes,
        "layers": sum(value.nbytes for value in weights.values()) - prefixes,
    }


def measure(case: str, mode: str, tokens: int = 4) -> dict[str, int]:
    """This rank's sizes, and what it sent for a prefill and for each token, with the formula's."""
    with watched(join()):
        model = load_share(GOLDEN / case, mode)
        parallel = model.parallel
        share_tokens = not parallel.ranks_agree
        choose = parallel.sampler(lambda logprobs: mx.argmax(logprobs, axis=-1))
        cache = model.make_cache()
        start = count_sent()
        model(mx.array([[1, 2, 3]]), cache=cache)
        mx.eval([c.state for c in cache])
        prefilled = count_sent()
        for token in range(tokens):
            mx.eval(choose(model(mx.array([[token]]), cache=cache)[:, -1]))
        formula = traffic_of_a_token(
            model.args, parallel.streams, parallel.tensor, itemsize=4, share_tokens=share_tokens
        )
        return sizes(model) | {
            "prefill": prefilled - start,
            "sent": (count_sent() - prefilled) / tokens,
            "formula": formula.bytes,
        }


def count_sent() -> int:
    # What was handed to the system is on its way a moment later.
    time.sleep(0.1)
    return sent_bytes() or 0


def errors_of_plans(cases: list[tuple[str, str]]) -> list[str]:
    """What ``plan`` says against sharing a golden case in a mode; "" where nothing."""
    errors = []
    for case, mode in cases:
        args = load_model(GOLDEN / case, lazy=True)[0].args
        try:
            plan(mode, join(), args)
        except ValueError as error:
            errors.append(str(error))
        else:
            errors.append("")
    return errors


def compare_facts(facts: list[dict[str, str]]) -> str | None:
    group = join()
    try:
        check_same(group, facts[group.rank()])
    except ValueError as error:
        return str(error)
    return None


def tokens_of_rank_0(differing: bool) -> tuple[list[list[int]], float]:
    """Tokens that each rank takes from logits of its own, and a random number of each."""
    group = join()
    parallel = Parallel(group, 2, 1)
    parallel.__dict__["ranks_agree"] = not differing
    logits = mx.eye(3)[[group.rank(), 2]]
    greedy = parallel.sampler(lambda logprobs: mx.argmax(logprobs, axis=-1))
    likeliest = parallel.sampler(None) or greedy
    taken = [choose(logits).tolist() for choose in (greedy, likeliest)]
    return taken, mx.random.uniform().item()


def end_one(rank: int, how: str) -> None:
    """Exchange without end; one rank ends soon, while the others wait for it."""
    with watched(join()):
        for n in range(10**9):
            if n == 20 and join().rank() == rank:
                time.sleep(0.5)
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("no memory\nfor this")
            mx.eval(all_gather(mx.zeros((1, 8)), join()))


def run_command_of_rank(arguments: list[list[str]]) -> None:
    """Run ``parscale``, with arguments for every rank."""
    from parscale_cli.main import cli

    cli(arguments[int(os.environ["MLX_RANK"])], prog_name="parscale")


def load_and_count(
    folder: Path, adapter: Path | None, mode: str, dequantize: bool = False
) -> tuple[int, list[int]]:
    """Bytes that this rank read to load its share, and the likeliest tokens it then finds."""
    with watched(join()):
        before = count_read()
        model, _ = load(folder, adapter_path=adapter, parallel=mode, dequantize=dequantize)
        read = count_read() - before
        logits = model(mx.array([[5, 17, 42, 9, 3, 64]]))
        return read, mx.argmax(logits[0], axis=-1).tolist()


def count_read() -> int:
    if sys.platform != "linux":
        return 0
    counts = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in counts)["rchar"])


def run_command_with_hub(address: str, cache: Path, arguments: list[list[str]]) -> None:
    """As ``run_command_of_rank``, with another hub and nothing downloaded from it yet."""
    huggingface_hub.constants.ENDPOINT = address
    huggingface_hub.hf_api.api.endpoint = address  # what lists a repository's files
    huggingface_hub.constants.HF_HUB_CACHE = str(cache)
    huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE = (
        address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    run_command_of_rank(arguments)


def run_command_with_input(text: str, arguments: list[list[str]]) -> None:
    """As ``run_command_of_rank``; rank 0's standard input holds a text, and stays open after it."""
    mine, theirs = os.pipe()
    if os.environ["MLX_RANK"] == "0":
        os.write(theirs, text.encode())
    os.dup2(mine, 0)
    sys.stdin = os.fdopen(0)
    run_command_of_rank(arguments)
