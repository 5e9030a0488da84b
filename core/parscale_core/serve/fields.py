"""Fields that requests of several APIs share."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_STOPS = 16
Context = Annotated[int, Field(ge=0, le=1 << 20)]


class Fields(BaseModel):
    """An object whose fields are all known and of the right type."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Open(BaseModel):
    """An object that may have more fields than are named here."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Generation(Fields):
    """How to answer, whichever API asks; what is None is the server's to say.

    ``user``, ``metadata`` and the like are a client's own notes, and change nothing.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    xtc_probability: float = Field(default=0.0, ge=0, le=1)
    xtc_threshold: float = Field(default=0.0, ge=0, le=0.5)
    repetition_penalty: float = Field(default=1.0, ge=0, le=100)
    presence_penalty: float = Field(default=0.0, ge=-100, le=100)
    frequency_penalty: float = Field(default=0.0, ge=-100, le=100)
    repetition_context_size: Context = 20
    presence_context_size: Context = 20
    frequency_context_size: Context = 20
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]
    ) = []  # pydantic copies defaults
    stream: bool = False
    stream_weights: bool = False
    draft_model: str | None = None
    num_draft_tokens: int | None = Field(default=None, ge=0, le=64)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] = False


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Fields):
    type: Literal["text"]


class ObjectFormat(Fields):
    type: Literal["json_object"]


class NamedSchema(Fields):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class Function(Fields):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function
