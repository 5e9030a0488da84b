"""The training loop. mlx-lm's own can neither pack documents nor go on where it was stopped."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from parscale_mlx.training import batches, data_parallel
from parscale_mlx.training.checkpoints import (
    Position,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    sweep,
    write_result,
)
from parscale_mlx.training.data import Data, read_data
from parscale_mlx.training.metrics_file import Metrics, make_reporters
from parscale_mlx.training.optimizer import make_optimizer
from parscale_mlx.training.start import Start, make_start, start_folder
from parscale_mlx.training.step import (
    grad_checkpointing,
    make_evaluation,
    make_step,
    micro_batches,
)
from parscale_mlx.training.terminal import Progress

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from parscale_core.checkpoint.output import check_output, place, working_folder
from parscale_core.train_settings import FILE, TrainSettings, load_settings


@dataclass
class TrainResult:
    """What came of a run.

    Attributes:
        output: the model's or the adapter's folder.
        steps, trained_tokens: of the whole run, also before it was resumed.
        valid_loss_before, valid_loss: nats a token; None without held-out text.
    """

    output: str
    steps: int
    trained_tokens: int
    valid_loss_before: float | None
    valid_loss: float | None


@dataclass
class Run:
    """A run that is ready to go on."""

    folder: Path
    settings: TrainSettings
    data: Data
    start: Start
    optimizer: optim.Optimizer
    position: Position


def train(settings: TrainSettings, *, force: bool = False, progress: bool = False) -> TrainResult:
    """Train from the beginning.

    Args:
        force: replace the output folder if it is a run's.
        progress: show progress on standard error.

    Raises:
        FileExistsError: the output folder exists.
        FileNotFoundError, ImportError, ValueError: settings, model or data are wrong.
        OSError: a checkpoint cannot be written; those before are still there.
        RuntimeError: the loss is no number any more.
    """
    settings.check()
    folder = Path(settings.output).expanduser()
    if data_parallel.rank() == 0:
        check_output(folder, force=force, marker=FILE)
    run = _prepare(settings, folder, None)
    if data_parallel.rank() == 0:
        with working_folder(folder) as work:
            (work / "run").mkdir()
            settings.save(work / "run")
            place(work / "run", folder, work / "replaced", force=force)
    return _go_on(run, progress)


def resume(folder: str | Path, *, progress: bool = False) -> TrainResult:
    """Go on with a run from its last checkpoint, or from its beginning where it has none.

    Data, losses and weights are those of a run that was never interrupted. Where several machines
    train, all of them must see the folder.

    Raises:
        FileExistsError: the run is finished.
        FileNotFoundError, ValueError: it is not a run, or its model or data are others now.
        ImportError, OSError, RuntimeError: as ``train``.
    """
    folder = Path(folder).expanduser()
    settings = load_settings(folder)
    if (finished := folder / _result_name(settings)).exists():
        raise FileExistsError(f"{finished}: this run is finished")
    if data_parallel.rank() == 0:
        sweep(folder)
    saved = checkpoints(folder)
    return _go_on(_prepare(settings, folder, saved[-1] if saved else None), progress)


def _prepare(settings: TrainSettings, folder: Path, checkpoint: Path | None) -> Run:
    data_parallel.check_batch_size(settings.batch_size)
    source = start_folder(settings)
    data = read_data(settings, source)
    start = make_start(settings, source, data.train)
    optimizer = make_optimizer(settings, start)
    position = Position(data=batches.fingerprint(data.train))
    data_parallel.check_same_data(position.data)
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint, start, optimizer)
        if saved.data != position.data:
            raise ValueError(f"{checkpoint}: the training data is not what it was")
        position = saved
    start.model.update(data_parallel.from_first(start.model.trainable_parameters()))
    if start.encoder is not None:
        start.encoder.update(data_parallel.from_first(start.encoder.parameters()))
    return Run(folder, settings, data, start, optimizer, position)


def _go_on(run: Run, progress: bool) -> TrainResult:
    settings, position = run.settings, run.position
    first = data_parallel.rank() == 0
    bar = Progress(position.step, settings.steps, shown=progress and first)
    callback: TrainingCallback = bar
    if first:
        others = make_reporters(
            settings.report_to, settings.project_name, run.folder, asdict(settings)
        )
        callback = Metrics(run.folder, position.step, [bar, *others])
    try:
        with grad_checkpointing(run.start.model, settings.grad_checkpoint):
            return _loop(run, bar, callback)
    except OSError as error:
        raise OSError(f"step {position.step}: {error}; {_last_good(run)}") from error
    finally:
        bar.close()


def _loop(run: Run, bar: Progress, callback: TrainingCallback) -> TrainResult:
    settings, position, model = run.settings, run.position, run.start.model
    first = data_parallel.rank() == 0
    step = make_step(run.start, run.optimizer, settings.clip)
    evaluate = make_evaluation(model, run.data.valid, settings.batch_size)
    if position.step == 0 and run.data.valid:
        position.valid_before = position.valid = _report_valid(evaluate, 0, callback)
    clock = time.perf_counter()
    while position.step < settings.steps:
        mx.random.seed(settings.seed + position.step)
        loss, count, norm = step(micro_batches(settings, run.data.train, position.step))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RuntimeError(
                f"step {position.step + 1}: the loss is {loss / count} and the gradients' norm "
                f"{norm}; {_last_good(run)}; a lower `lr` or `clip` may help"
            )
        position.step += 1
        position.trained_tokens += int(count)
        position.losses = [a + b for a, b in zip(position.losses, (loss, count, 1), strict=True)]
        bar.advance()
        last = position.step == settings.steps
        if last or position.step % settings.report_every == 0:
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            _report_train(run, norm, seconds, callback)
        if run.data.valid and (last or position.step % settings.eval_every == 0):
            position.valid = _report_valid(evaluate, position.step, callback)
            clock = time.perf_counter()
        if first and (last or position.step % settings.save_every == 0):
            _check_finite(run)
            save_checkpoint(run.folder, run.start, run.optimizer, position, settings.keep)
    return _finish(run)


def _finish(run: Run) -> TrainResult:
    output = run.folder / _result_name(run.settings)
    if data_parallel.rank() == 0:
        with working_folder(output) as work:
            write_result(work / "result", run.start)
            place(work / "result", output, work / "replaced", force=False)
    position = run.position
    return TrainResult(
        output=str(output),
        steps=position.step,
        trained_tokens=position.trained_tokens,
        valid_loss_before=position.valid_before,
        valid_loss=position.valid,
    )


def _report_train(run: Run, norm: float, seconds: float, callback: TrainingCallback) -> None:
    position = run.position
    loss, count, steps = position.losses
    position.losses = [0.0, 0.0, 0.0]
    callback.on_train_loss_report(
        {
            "iteration": position.step,
            "train_loss": loss / count,
            "learning_rate": run.optimizer.learning_rate.item(),
            "gradient_norm": norm,
            "iterations_per_second": steps / seconds,
            "tokens_per_second": count / seconds,
            "trained_tokens": position.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
    )


def _report_valid(evaluate: Callable[[], float], step: int, callback: TrainingCallback) -> float:
    begin = time.perf_counter()
    loss = evaluate()
    seconds = time.perf_counter() - begin
    callback.on_val_loss_report({"iteration": step, "val_loss": loss, "val_time": seconds})
    return loss


def _check_finite(run: Run) -> None:
    # The last update may have overflowed, which the loss would only show at the next step.
    start = run.start
    trained = [start.model.trainable_parameters()]
    if start.encoder is not None:
        trained.append(start.encoder.trainable_parameters())
    weights = dict(tree_flatten(trained)).values()
    if not all(mx.all(mx.isfinite(a)).item() for a in weights):
        raise RuntimeError(
            f"step {run.position.step}: a weight is no finite number any more; {_last_good(run)}; "
            f"a lower `lr` may help"
        )


def _result_name(settings: TrainSettings) -> str:
    return "model" if settings.trains_backbone else "adapter"


def _last_good(run: Run) -> str:
    saved = checkpoints(run.folder)
    return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
