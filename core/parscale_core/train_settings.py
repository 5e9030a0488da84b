"""What a training run is told, kept in its folder as ``run.json``; the defaults stand here."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

STAGES = ("pretrain", "streams")
DTYPES = ("float32", "bfloat16", "float16")
INITS = ("text", "random")
FILE = "run.json"


@dataclass
class TrainSettings:
    """A training run.

    Attributes:
        stage: "pretrain" trains a decoder on packed documents; "streams" trains P streams over it.
        data: files (text, or JSON lines in mlx-lm's formats), folders of them, hub data sets.
        output: the run's folder: metrics, checkpoints, and in the end ``model`` or ``adapter``.
        model: the model to start from, a folder or a hub name.
        config: a folder with a ``config.json`` and a tokenizer, to start from nothing else.
        adapter: a stream adapter over ``model`` to start from.
        valid: held-out data, as ``data``; without it ``hold_out`` of the documents.
        pattern: which files of a folder are read.
        streams, prefix_length, smoothing: P, the prefixes' length, and ``parscale_attn_smooth``.
        init: prefixes made from pieces of the training text, or at random.
        prefix_projection: train an MLP that makes the prefixes; an adapter holds what it made.
        encoder_hidden_size: of that MLP's hidden layer; by default the model's.
        train_all: train the backbone too; otherwise it is frozen, and an adapter comes of it.
        dtype: the type of all weights that are trained; a frozen backbone's is ``load_model``'s.
        seq_length: tokens that predict another, in a window of packed text or a sample at most.
        truncate: cut samples that are longer instead of refusing them.
        batch_size: sequences of a micro-batch, over all machines.
        accumulate: micro-batches of a step.
        lr, streams_lr, aggregator_lr: peak learning rates, of the backbone, of the prefixes and of
            the aggregator; by default each is the one before.
        warmup: steps of linear warm-up; by default a twentieth of all.
        final_lr: where the cosine decay ends, as a share of the peak.
        clip: the gradients' norm at most.
        report_to: mlx-lm's reporters, such as "wandb,swanlab".
    """

    stage: str
    data: list[str]
    output: str
    model: str | None = None
    config: str | None = None
    adapter: str | None = None
    valid: list[str] = field(default_factory=list)
    hold_out: float = 0.05
    pattern: str = "*"
    streams: int | None = None
    prefix_length: int = 48
    smoothing: float = 0.01
    init: str = "text"
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    train_all: bool = False
    dtype: str = "float32"
    seq_length: int = 512
    truncate: bool = False
    batch_size: int = 8
    accumulate: int = 1
    steps: int = 1000
    lr: float = 3e-4
    streams_lr: float | None = None
    aggregator_lr: float | None = None
    warmup: int | None = None
    final_lr: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    grad_checkpoint: bool = False
    seed: int = 0
    report_every: int = 10
    eval_every: int = 200
    eval_sequences: int | None = None
    save_every: int = 200
    keep: int = 3
    report_to: str | None = None
    project_name: str | None = None

    def check(self) -> None:
        """Check what can be checked without looking at any file.

        Raises:
            ValueError: options contradict each other; the message names them.
        """
        for name, choices in (("stage", STAGES), ("dtype", DTYPES), ("init", INITS)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
        if (self.model is None) == (self.config is None):
            raise ValueError("give either `model` to start from, or `config` to start from nothing")
        if self.stage == "pretrain":
            self._refuse("`stage=streams`", streams=self.streams, adapter=self.adapter,
                         prefix_projection=self.prefix_projection or None)  # fmt: skip
        elif self.config is not None:
            raise ValueError("`config` starts from nothing: it needs `stage=pretrain`")
        elif self.streams is not None and self.adapter is not None:
            raise ValueError("`streams` cannot go with `adapter`, which has its number of streams")
        elif self.streams is None and self.adapter is None and not self.train_all:
            raise ValueError("`stage=streams` needs either `streams` or `adapter` to start from")
        if not self.prefix_projection:
            self._refuse("`prefix_projection`", encoder_hidden_size=self.encoder_hidden_size)
        elif self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ValueError(f"encoder_hidden_size={self.encoder_hidden_size}: not at least 1")
        for name in ("seq_length", "batch_size", "accumulate", "steps", "keep", "prefix_length",
                     "report_every", "eval_every", "save_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: not at least 1")
        if not self.data:
            raise ValueError("give `data`: a file, a folder or a hub data set")
        if not 0 <= self.hold_out < 1:
            raise ValueError(f"hold_out={self.hold_out}: not from 0 to below 1")
        if self.warmup is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup}: not below steps={self.steps}")

    def _refuse(self, needed: str, **given: object) -> None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"`{name}` needs {needed}")

    @property
    def trains_backbone(self) -> bool:
        return self.stage == "pretrain" or self.train_all

    def save(self, folder: Path) -> None:
        """Write ``run.json``."""
        text = json.dumps(asdict(self), indent=4)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def load_settings(folder: Path) -> TrainSettings:
    """The settings of an earlier run.

    Raises:
        FileNotFoundError, ValueError: the folder holds no run.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {FILE} in this folder; not a training run")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        settings = TrainSettings(**values)
        settings.check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not the settings of a training run: {error}") from error
    known = {f.name for f in fields(TrainSettings)}
    assert known >= values.keys()
    settings.output = str(folder)
    return settings
