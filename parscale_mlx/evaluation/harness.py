"""lm-evaluation-harness over a ParScale model, through mlx-lm's adapter."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from parscale_mlx.model import Model

import mlx.core as mx
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM
from mlx_lm.tokenizer_utils import TokenizerWrapper


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
        self._max_tokens, self._batch_size = max_tokens, batch_size
        self.use_chat_template, self._sampler = use_chat_template, None


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
