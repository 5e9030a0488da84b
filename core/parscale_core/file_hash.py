"""A file's hash."""

import hashlib
from pathlib import Path

PART = 1 << 20  # bytes to read at a time


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(PART):
            digest.update(part)
    return digest.hexdigest()
