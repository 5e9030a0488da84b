"""The sequences that a run learns from, and those that are held out."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from parscale_mlx.tokenizer import load_tokenizer
from parscale_mlx.training.batches import bound, pack, split
from parscale_mlx.training.documents import Document, read_documents, valid_beside

from parscale_core.checkpoint.config import read_config
from parscale_core.train_settings import TrainSettings


@dataclass
class Data:
    """Sequences of at most ``seq_length`` + 1 tokens."""

    train: list[Document]
    valid: list[Document]


def read_data(settings: TrainSettings, folder: Path) -> Data:
    """Read and cut what the settings name.

    Text is packed; what has a prompt stays one sequence a sample, but for pretraining.

    Args:
        folder: the model's, with its tokenizer.

    Raises:
        FileNotFoundError, ImportError, ValueError: as ``read_documents``; or there is too little,
            or a sample is too long, or the model has no embedding for a token.
    """
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config.raw)
    read = partial(
        read_documents,
        tokenizer=tokenizer,
        pattern=settings.pattern,
        mask_prompt=settings.stage == "streams",
    )
    documents = read(settings.data)
    held = settings.valid or valid_beside(settings.data)
    if held:
        valid = _sequences(read(held), settings, held)
        train = _sequences(documents, settings, settings.data)
    elif settings.hold_out == 0:
        train, valid = _sequences(documents, settings, settings.data), []
    elif len(documents) >= 2 / settings.hold_out:
        documents, held_out = split(documents, settings.hold_out)
        train = _sequences(documents, settings, settings.data)
        valid = _sequences(held_out, settings, settings.data)
    else:
        train, valid = split(_sequences(documents, settings, settings.data), settings.hold_out)
    _check_tokens(train + valid, config.vocab_size, folder)
    return Data(train, _spread(valid, settings.eval_sequences))


def _sequences(
    documents: list[Document], settings: TrainSettings, paths: list[str]
) -> list[Document]:
    if settings.stage == "pretrain" or not any(d.prompt for d in documents):
        sequences = pack(documents, settings.seq_length)
    else:
        sequences = bound(documents, settings.seq_length, truncate=settings.truncate)
    if not sequences:
        tokens = sum(len(d.tokens) for d in documents)
        raise ValueError(
            f"{', '.join(paths)}: {tokens} tokens are too few for one sequence of "
            f"seq_length={settings.seq_length}"
        )
    return sequences


def _spread(sequences: list[Document], most: int | None) -> list[Document]:
    """At most so many sequences, evenly spaced."""
    if most is None or most >= len(sequences):
        return sequences
    return [sequences[n * len(sequences) // most] for n in range(most)]


def _check_tokens(sequences: list[Document], vocabulary: int, folder: Path) -> None:
    largest = max(int(s.tokens.max()) for s in sequences)
    if largest >= vocabulary:
        raise ValueError(
            f"{folder}: the tokenizer gives token {largest}, but config.json says vocab_size "
            f"{vocabulary}"
        )
