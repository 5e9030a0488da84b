"""The options of KV caches, and of drafts."""

from parscale_core.engine import CacheOptions, Request

from parscale_cli.options.command import default_of, option, together
from parscale_cli.options.types import OneOf, Whole


def _of(field: str, *names: str, **settings):
    default = default_of(CacheOptions, field)
    return option(*names, section="KV cache", default=default, show_default=True, **settings)


max_kv_size_option = _of(
    "max_size", "--max-kv-size", type=Whole(5),
    help="Keep about this many tokens in a rotating KV cache, besides the prefix.",
)  # fmt: skip
quantised_cache_options = together(
    _of("bits", "--kv-bits", type=OneOf(2, 3, 4, 5, 6, 8),
        help="Quantise KV caches to this many bits. Answers then come one at a time."),
    _of("group_size", "--kv-group-size", type=OneOf(32, 64, 128),
        help="Numbers of a KV cache that are quantised together."),
    _of("quantized_start", "--quantized-kv-start", type=Whole(0),
        help="Quantise a KV cache once it holds this many tokens."),
)  # fmt: skip
num_draft_tokens_option = option(
    "--num-draft-tokens", section="Drafts", of=Request, type=Whole(1, 64),
    help="Tokens to draft at a time.",
)  # fmt: skip
