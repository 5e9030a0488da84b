"""Symbolic links in a model folder: none is followed out of it, but for the hub's cache."""

from pathlib import Path


def check_link(file: Path) -> None:
    """Check that a file of a model folder is not a link out of that folder.

    In the hub's cache the files of ``models--NAME/snapshots/REVISION`` are links to ``blobs``
    beside ``snapshots``; those are the repository's own.

    Raises:
        ValueError: it leads elsewhere.
    """
    if not file.is_symlink():
        return
    real, folder = file.resolve(), file.parent.resolve()
    roots = [folder]
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots":
            roots.append(snapshot.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"{file}: a link out of the model's folder (to {real})")
