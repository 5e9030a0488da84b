"""What clients call the models: one backbone in memory, a name for each number of streams."""

from collections.abc import Sequence

from parscale_core.serve.api_errors import RequestFailed

# What mlx-lm's clients call the model that the server was started with, and its draft.
DEFAULT = "default_model"


class ModelNames:
    """The names of a served model.

    Args:
        name: what clients call it; ``NAME:pP`` is the one with P streams.
        streams: the P that there are, the default first.
        drafts: what a request's draft may be, as the engine says.

    Attributes:
        default: the full name of the default.
        streams: P by full name.
    """

    def __init__(self, name: str, streams: Sequence[int], drafts: Sequence[int | str] = ()):
        self.streams = {f"{name}:p{n}": n for n in sorted(streams)}
        self.default = f"{name}:p{streams[0]}"
        self.name, self.drafts = name, drafts

    @property
    def all(self) -> list[str]:
        return [self.name, *self.streams]

    def resolve(self, name: str | None) -> str:
        """The full name of the model that a request means.

        Raises:
            RequestFailed: there is no such model here.
        """
        full = self.default if name in (None, self.name, DEFAULT) else str(name)
        if full not in self.streams:
            message = f"no model {full[:200]!r} here, only {', '.join(self.all)}"
            raise RequestFailed(404, message, "model_not_found", "model")
        return full

    def draft(self, name: str | None, model: str, default: int | str | None) -> int | str | None:
        """What drafts for a model; None if nothing does.

        Args:
            name: as the request has it.
            model: its full name.
            default: where the request does not say.

        Raises:
            RequestFailed: nothing of that name drafts here.
        """
        draft: int | str | None
        if name in (None, DEFAULT):
            draft = default
        elif name == "ngram":
            draft = "ngram"
        else:
            draft = self.streams.get(self.default if name == self.name else str(name), "")
        if draft is None or draft == self.streams[model]:
            return None
        if draft not in self.drafts:
            there = [n for n in self.all if self.streams.get(n, n) in (*self.drafts, self.name)]
            there += ["ngram"] * ("ngram" in self.drafts)
            what = f"only {', '.join(there)}" if self.drafts else "nothing drafts here"
            raise RequestFailed(
                400, f"draft_model: no model {str(name)[:200]!r} here, {what}", None, "draft_model"
            )
        return draft
