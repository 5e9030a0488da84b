"""Defaults that the engines have in common with the command line's options."""

PROMPT_CACHE_SIZE = 10  # prompts whose KV caches are kept
PROMPT_CACHE_BYTES = 4 << 30
WATCH_TIMEOUT = 60.0  # seconds without a sign of life until a rank counts as frozen
