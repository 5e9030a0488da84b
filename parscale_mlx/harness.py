"""lm-evaluation-harness over a ParScale model."""

import copy
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from math import isnan
from pathlib import Path
from typing import Any

from parscale_mlx.engine import MlxEngine

import mlx.core as mx
from lm_eval import simple_evaluate
from lm_eval.api.model import LM, TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from mlx_lm.evaluate import MLXLM
from parscale_core.checkpoint.tokenizer import check_tokens
from parscale_core.engine import Request, Sampling
from parscale_core.finite import not_finite

ANSWER_TOKENS = 256  # where a task does not say, as in the harness


class ModelInHarness(TemplateLM, MLXLM):
    """One of an engine's models: encoded as the harness has it, scored with mlx-lm's functions.

    The harness's own class says what an empty context is (a token that begins texts) and whose the
    spaces between a context and a continuation are (the continuation's).

    Args:
        streams: P.
        max_tokens: of an answer; by default what a task says.
    """

    def __init__(
        self, engine: MlxEngine, streams: int, *, max_tokens: int | None, use_chat_template: bool
    ):
        LM.__init__(self)
        self._engine, self._streams = engine, streams
        self._model: Any = engine.models[streams]
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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not self.use_chat_template
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        check_tokens(ids, self._engine.vocab_size)
        return ids

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        quiet = disable_tqdm or not sys.stderr.isatty()
        scored = TemplateLM.loglikelihood(self, requests, disable_tqdm=quiet)
        _check_scores(score for score, _ in scored)
        return scored

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        scores = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            scores.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        _check_scores(scores)
        return scores

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        answers = [self._engine.submit(self._request(*request.args)) for request in requests]
        return ["".join(piece.text for piece in answer) for answer in answers]

    def _request(self, context: str, options: dict[str, Any]) -> Request:
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        most = self._answer_tokens or options.get("max_gen_toks", ANSWER_TOKENS)
        # The prompt's end counts most; at least half of the context is its.
        prompt = prompt[-max(self.context - most, self.context // 2) :]
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else until
        return Request(
            prompt,
            streams=self._streams,
            sampling=Sampling(max_tokens=most),
            stop=tuple(text for text in stop if text),
        )

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        """Of each (texts, context, continuation): its score, and whether it is the likeliest."""
        scored, last, computed = [], None, None
        for _texts, context, continuation in requests:
            continuation = continuation[-self.context :]
            context = context[-(self.context + 1 - len(continuation)) :]
            if not continuation:
                scored.append((0.0, True))
                continue
            # The answers to one question follow each other.
            if computed is None or context != last:
                last, computed = context, self._process_prompt(context)
            logprobs, cache = computed
            score = logprobs[0, continuation[0]].item()
            is_greedy = continuation[0] == mx.argmax(logprobs).item()
            if len(continuation) > 1:
                more, _, greedy = self._score_fn(
                    mx.array(continuation)[None], cache=copy.deepcopy(cache)
                )
                score += mx.sum(more).item()
                is_greedy = is_greedy and mx.all(greedy).item()
            scored.append((score, is_greedy))
        return scored


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
                f"no task {name!r} in lm-evaluation-harness or the folders of --include-path"
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
    mx.random.seed(seed)
    # What mlx-lm and the harness print on the way is not a result.
    with redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=model.use_chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            confirm_run_unsafe_code=run_unsafe_code,
            log_samples=False,
        )
    assert results is not None
    return dict(results["results"])
