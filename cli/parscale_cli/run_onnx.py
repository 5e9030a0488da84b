"""Generation on onnxruntime, from a folder that ``parscale export-onnx`` wrote."""

import sys
from collections.abc import Iterator
from pathlib import Path

import transformers
from parscale_core.checkpoint.tokenizer import end_tokens
from parscale_export import OnnxModel
from tokenizers import Tokenizer, decoders

from parscale_cli.answer import Piece, StopStrings
from parscale_cli.sampling import Sampling


class OnnxRuntime:
    """An export opened on onnxruntime, with the tokenizer in its folder.

    Args:
        model: the export's folder, or one of the graphs in it.
        streams, provider, device_id, threads, cuda_graph: as for ``OnnxModel``.

    Raises:
        FileNotFoundError: no graph there, no external data, or no tokenizer.
        ValueError: not one of our graphs, a provider that cannot run it, or a bad tokenizer.
    """

    def __init__(
        self,
        model: str,
        *,
        streams: int | None = None,
        provider: str | None = None,
        device_id: int = 0,
        threads: int | None = None,
        cuda_graph: bool | None = None,
    ):
        path = Path(model).expanduser()
        self.model = OnnxModel(
            path,
            provider,
            streams=streams,
            device_id=device_id,
            threads=threads,
            cuda_graph=cuda_graph,
        )
        self.streams = self.model.streams
        folder = path if path.is_dir() else path.parent
        self.tokenizer = load_tokenizer(folder)
        own = self.tokenizer.eos_token_id
        self.ends = frozenset(end_tokens(folder) + ([] if own is None else [own]))
        self.keep_cache = False

    def require_streams(self) -> None:
        if not self.model.aggregation_weights:
            raise ValueError(
                f"{self.model.file}: exported without --aggregation-weights, so it does not say "
                "which stream spoke"
            )

    def answer(
        self, prompts: list[list[int]], sampling: Sampling, *, with_streams: bool
    ) -> Iterator[Piece]:
        answers = [_Answer(self.tokenizer, sampling.stop) for _ in prompts]
        going = set(range(len(prompts)))
        tokens = self.model.stream(
            prompts,
            sampling.max_tokens,
            stop_tokens=sorted(self.ends),
            seed=sampling.seed,
            temperature=sampling.temp,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_context=sampling.repetition_context,
        )
        for prompt, token, weights in tokens:
            # A row that a stop string ended is still computed with the others of its batch.
            if prompt not in going:
                continue
            answer = answers[prompt]
            finish = "stop" if token in self.ends else None
            if finish is None and len(answer.tokens) + 1 == sampling.max_tokens:
                finish = "length"
            text = answer.push(token, finish)
            finish = "stop" if answer.stop.found else finish
            streams = weights.tolist() if with_streams and weights is not None else None
            yield Piece(prompt, text, token, finish, streams)
            if finish:
                going.discard(prompt)
            if not going:
                return

    def add_streams(self, prompts: list[list[int]], pieces: Iterator[Piece]) -> Iterator[Piece]:
        return pieces

    def peak_memory(self) -> int:
        # Of the whole process, in the host's memory; a GPU's own is not counted.
        if sys.platform == "win32":
            import psutil

            return psutil.Process().memory_info().peak_wset
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class _Answer:
    """One answer's tokens so far, and its text as far as it is final."""

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.decoder = decoders.DecodeStream(skip_special_tokens=False)
        self.tokens: list[int] = []
        self.decoded = ""
        self.stop = StopStrings(stop)
        # The space that byte-level vocabularies put before a first word, as mlx-lm leaves it out.
        self.leaves_out_space = isinstance(self.backend.decoder, decoders.ByteLevel)

    def push(self, token: int, finish: str | None) -> str:
        """Add a token (unless it ends the text); return what text became final."""
        text = ""
        if finish != "stop":
            self.tokens.append(token)
            text = self.decoder.step(self.backend, token) or ""
        if finish:
            # Bytes of a character that never came to its end.
            whole = self.backend.decode(self.tokens, skip_special_tokens=False)
            text = whole[len(self.decoded) :]
        shown = text
        if self.leaves_out_space and not self.decoded:
            shown = text.removeprefix(" ")
        self.decoded += text
        shown = self.stop.push(shown)
        return shown + self.stop.flush() if finish and not self.stop.found else shown


def load_tokenizer(folder: Path):
    """The tokenizer in an export's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or only by running code from the folder.
    """
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json in this folder")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for bad files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: the tokenizer cannot be read: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
