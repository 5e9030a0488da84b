"""The models of a server: one backbone in memory, one name for each number of streams over it."""

from argparse import Namespace
from typing import Any

from parscale_mlx.model import Model
from parscale_mlx.parallel import Parallel
from parscale_mlx.serve.failure import RequestFailed
from parscale_mlx.serve.settings import Settings
from parscale_mlx.taps import StreamTap

from mlx_lm.server import ModelProvider
from mlx_lm.tokenizer_utils import TokenizerWrapper

PREFILL_STEP = 2048
PROMPTS_AT_ONCE = 8
# What mlx-lm's clients call the model that the server was started with, and its draft.
DEFAULT = "default_model"


class ServedModels(ModelProvider):
    """mlx-lm's provider of models, over models that are in memory already.

    Args:
        models: by number of streams, as ``open_models`` gives them; only one may be shared with
            other processes.
        name: what clients call the model; ``NAME:pP`` is the one with P streams.
        streams: those of the model behind ``name`` alone; by default the most that there are.
        draft: what drafts for the others in speculative decoding where a request does not say: a
            model, or the full name of one of these.

    Raises:
        ValueError: there is no model of so many streams.
    """

    def __init__(
        self,
        models: dict[int, Model],
        tokenizer: TokenizerWrapper,
        *,
        name: str,
        settings: Settings,
        streams: int | None = None,
        draft: Model | str | None = None,
    ):
        super().__init__(_mlx_lm_arguments(settings))
        self.taps = {f"{name}:p{n}": StreamTap(model) for n, model in models.items()}
        self.shared_tokenizer = tokenizer
        self.settings = settings
        self.vocabulary = next(iter(models.values())).args.vocab_size
        self.context = next(iter(models.values())).args.max_position_embeddings
        if streams is not None and streams not in models:
            there = ", ".join(map(str, models))
            raise ValueError(f"no model or adapter here has {streams} streams, only {there}")
        self.parallel: Parallel | None = next(iter(models.values())).parallel
        self.default = f"{name}:p{streams or max(models)}"
        self.aliases = {name: self.default, DEFAULT: self.default}
        self.drafts = {full: tap.model for full, tap in self.taps.items()}
        if isinstance(draft, str):
            self.drafts[DEFAULT] = self.drafts[draft]
        elif draft is not None:
            self.drafts[DEFAULT] = draft

    @property
    def names(self) -> list[str]:
        """What clients may ask for: the name alone, and the name with each number of streams."""
        return [next(iter(self.aliases)), *self.taps]

    def facts(self) -> dict[str, str]:
        """What must not differ between ranks that serve together, for ``ranks.check_same``."""
        names = ("max_concurrent", "prompt_cache_size", "prompt_cache_bytes")
        settings = {name.replace("_", "-"): str(getattr(self.settings, name)) for name in names}
        return settings | {"name of the model": self.default}

    def resolve(self, name: str | None) -> str:
        """The full name of the model that a request means.

        Raises:
            RequestFailed: there is no such model here.
        """
        full = self.default if name is None else self.aliases.get(name, name)
        if full not in self.taps:
            raise RequestFailed(
                404, f"no model {name!r} here, only {', '.join(self.names)}", "model_not_found"
            )
        return full

    def resolve_draft(self, name: str | None, model: str) -> str | None:
        """What drafts for a model in a request; None if nothing does.

        Args:
            name: as the request has it.
            model: its full name.

        Raises:
            RequestFailed: there is no such model here.
        """
        if name is None or name == DEFAULT:
            full = DEFAULT if DEFAULT in self.drafts else model
        else:
            full = self.aliases.get(name, name)
        if full not in self.drafts:
            names = ", ".join(self.names)
            raise RequestFailed(400, f"draft_model: no model {name!r} here, only {names}")
        return None if self.drafts[full] is self.drafts[model] else full

    def load_default(self):
        self.load(self.default)

    def load(self, model_path, adapter_path=None, draft_model_path=None):
        # Nothing is read here: a request picks one of the models in memory, or fails.
        # mlx-lm's attributes are typed by the None they begin with.
        self.model: Any = self.taps[model_path]
        self.tokenizer: Any = self.shared_tokenizer
        self.draft_model: Any = draft_model_path and self.drafts[draft_model_path]
        self.model_key: Any = (model_path, draft_model_path)
        self.is_batchable = True
        return self.model, self.tokenizer


def _mlx_lm_arguments(settings: Settings) -> Namespace:
    """What mlx-lm's server would have parsed from its command line."""
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=settings.num_draft_tokens,
        trust_remote_code=False,
        chat_template="",
        chat_template_args={},
        use_default_chat_template=False,
        pipeline=False,
        allowed_origins=list(settings.allowed_origins),
        max_tokens=settings.max_tokens,
        temp=settings.temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        decode_concurrency=settings.max_concurrent,
        prompt_concurrency=min(PROMPTS_AT_ONCE, settings.max_concurrent),
        prefill_step_size=PREFILL_STEP,
        prompt_cache_size=settings.prompt_cache_size,
        prompt_cache_bytes=settings.prompt_cache_bytes,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
    )
