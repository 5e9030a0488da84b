"""lm-evaluation-harness over a ParScale model, through mlx-lm's adapter."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from math import isnan
from pathlib import Path
from typing import Any

from parscale_mlx.model import Model

import mlx.core as mx
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM
from mlx_lm.tokenizer_utils import TokenizerWrapper
from parscale_core.checkpoint.tokenizer import check_tokens
from parscale_core.finite import not_finite


class ModelInHarness(MLXLM):
    """mlx-lm's adapter, given a model that is loaded already.

    Args:
        max_tokens: of an answer; by default what a task says.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        *,
        max_tokens: int | None,
        batch_size: int,
        use_chat_template: bool,
    ):
        LM.__init__(self)
        self._model, self.tokenizer = model, tokenizer
        # mlx-lm's adapter would also cut prompts to be scored to this many tokens.
        self._max_tokens, self._answer_tokens = None, max_tokens
        self._batch_size, self._sampler = batch_size, None
        self.use_chat_template = use_chat_template

    def _tokenize(self, texts):
        tokens = super()._tokenize(texts)
        for ids in tokens:
            check_tokens(ids, self._model.args.vocab_size)
        return tokens

    def generate_until(self, requests):
        self._max_tokens = self._answer_tokens
        try:
            return super().generate_until(requests)
        finally:
            self._max_tokens = None

    def loglikelihood(self, requests):
        scored = super().loglikelihood(requests)
        _check_scores(score for score, _ in scored)
        return scored

    def loglikelihood_rolling(self, requests):
        scores = super().loglikelihood_rolling(requests)
        _check_scores(scores)
        return scores


def _check_scores(scores: Iterable[float]) -> None:
    # Where no prompt is left, mlx-lm says -inf.
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
