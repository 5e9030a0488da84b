"""lm-evaluation-harness over any engine."""

import random
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from math import isnan
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from parscale_core.checkpoint.tokenizer import check_tokens
from parscale_core.engine import Engine, Request, Sampling
from parscale_core.error_text import not_finite
from parscale_core.progress import hidden

ANSWER_TOKENS = 256  # where a task does not say, as in the harness
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ModelInHarness(TemplateLM):
    """An engine, as the harness asks models.

    The harness's own class says what an empty context is (a token that begins texts) and whose the
    spaces between a context and a continuation are (the continuation's). What goes beyond that is
    as in mlx-lm: contexts are encoded with a first token, unless a template wrote it.

    Args:
        streams: P.
        max_tokens: of an answer; by default what a task says.
        seed: of answers that a task has sampled.
    """

    def __init__(
        self,
        engine: Engine,
        streams: int,
        *,
        max_tokens: int | None,
        use_chat_template: bool,
        seed: int = 0,
    ):
        super().__init__()
        self._engine, self._streams, self._seed = engine, streams, seed
        self.tokenizer: Any = engine.tokenizer
        self._answer_tokens, self.use_chat_template = max_tokens, use_chat_template
        self.context = engine.context_length or sys.maxsize

    @property
    def eot_token_id(self) -> int:
        return min(self._engine.end_tokens)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not self.use_chat_template
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        check_tokens(ids, self._engine.vocab_size)
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        quiet = disable_tqdm or not sys.stderr.isatty()
        scored = super().loglikelihood(requests, disable_tqdm=quiet)
        _check_scores(score for score, _ in scored)
        return scored

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        pairs, counts = [], []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            own = [(("", ""), *make_disjoint_window(window)) for window in windows]
            pairs += own
            counts.append(len(own))
        scored = iter(self._loglikelihood_tokens(pairs, disable_tqdm))
        scores = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        _check_scores(scores)
        return scores

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        answers = [
            self._engine.submit(self._request(number, *request.args))
            for number, request in enumerate(requests)
        ]
        return ["".join(piece.text for piece in answer) for answer in self._bar(answers, "answers")]

    def _request(self, number: int, context: str, asked: dict[str, Any]) -> Request:
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, ANSWER_TOKENS))
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        most = self._answer_tokens or options["max_gen_toks"]
        # The prompt's end counts most; at least half of the context is its.
        prompt = prompt[-max(self.context - most, self.context // 2) :]
        known = (*SAMPLING, "until", "max_gen_toks", "do_sample")
        for name, value in options.items():
            if name not in known and (name, value) != ("num_beams", 1):
                raise ValueError(f"generation_kwargs of a task: {name}: {value} is not known here")
        if options["do_sample"]:
            options = {"temperature": 1.0, "seed": self._seed + number} | options
        sampling = {name: options[name] for name in (*SAMPLING, "seed") if name in options}
        return Request(
            prompt,
            streams=self._streams,
            sampling=Sampling(max_tokens=most, **sampling),
            stop=tuple(text for text in options["until"] if text),
        )

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
        """Of each (texts, context, continuation): its score, and whether it is the likeliest."""
        pairs = []
        for _texts, context, continuation in requests:
            continuation = continuation[-self.context :]
            pairs.append((context[-(self.context + 1 - len(continuation)) :], continuation))
        scores = self._engine.score([pair for pair in pairs if pair[1]], self._streams)
        return [next(scores) if pair[1] else (0.0, True) for pair in self._bar(pairs, "scores")]

    def _bar(self, values: Sequence[Any], unit: str) -> Iterable[Any]:
        return tqdm(values, f"P={self._streams}", unit=f" {unit}", disable=hidden(), leave=False)


def _check_scores(scores: Iterable[float]) -> None:
    if any(isnan(score) for score in scores):
        raise ArithmeticError(not_finite("the model's logits have"))


def open_tasks(names: Sequence[str], folders: Sequence[Path]) -> tuple[TaskManager, list[str]]:
    """Find tasks by name or pattern, among the harness's own and those in more folders.

    Raises:
        ValueError: there is no such task.
    """
    own = [str(folder) for folder in folders]
    if own:
        # Looking through the harness's own thousands of tasks takes seconds.
        manager = TaskManager(include_path=own, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager, manager.match_tasks(list(names))
    manager = TaskManager(include_path=own or None)
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"no task {name!r} in lm-evaluation-harness or the folders of `folders`"
            )
    return manager, manager.match_tasks(list(names))


def evaluate(
    model: ModelInHarness,
    manager: TaskManager,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None,
    limit: int | None,
    seed: int,
    run_unsafe_code: bool,
) -> dict[str, dict[str, Any]]:
    """Run tasks; of each, its metrics as the harness names them, and their standard errors.

    Raises:
        OSError: a task's data is neither here nor to be had.
    """
    random.seed(seed)
    np.random.seed(seed)
    # What the harness prints on the way is not a result.
    with redirect_stdout(sys.stderr):
        # As its simple_evaluate, which also has git describe the folder it runs in.
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            shots = task.get_config("num_fewshot")
            if shots is None or (num_fewshot is not None and shots != 0):
                task.set_config("num_fewshot", num_fewshot or 0)
            task.set_fewshot_seed(seed)
        results = lm_eval.evaluate(
            model,
            loaded,
            limit=limit,
            apply_chat_template=model.use_chat_template,
            confirm_run_unsafe_code=run_unsafe_code,
            log_samples=False,
        )
    assert results is not None
    return dict(results["results"])
