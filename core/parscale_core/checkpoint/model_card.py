"""The README.md of a converted model."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from parscale_core.checkpoint.links import check_link

# The published checkpoints' cards say "academic use only" beside apache-2.0.
RESTRICTION = re.compile(
    r"academic (use|purpose|research)|research (use|purposes?)|non-?commercial", re.IGNORECASE
)
TAGS = ("mlx", "parscale")


def write_card(folder: Path, *, name: str, origin: Path, hub_name: str | None) -> None:
    """Write the model card, with what the origin's own card says of its licence and languages.

    Args:
        name: the converted model's.
        origin: the folder that it was converted from.
        hub_name: the hub repository that it was converted from, if it was.
    """
    card = _origin_card(origin)
    data = _known(card)
    if hub_name is not None:
        data.base_model = hub_name
    data.library_name, data.pipeline_tag = "mlx", "text-generation"
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS]))
    source = f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else f"`{origin.name}`"
    text = f"""
# {name}

{source}, converted to MLX with parscale.

```shell
pip install parscale
parscale generate --model {name} --prompt "Why is the sky blue?"
```
{_terms(card)}"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")


def _origin_card(origin: Path) -> ModelCard | None:
    file = origin / "README.md"
    if not file.is_file():
        return None
    check_link(file)
    try:
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except Exception:  # whatever its YAML parser met; the model is what matters
        return None


def _terms(card: ModelCard | None) -> str:
    """What the text of a card says of who may use the model, beside the licence that it names."""
    lines = [line.strip(" #>*-") for line in (card.text if card else "").splitlines()]
    found = "".join(f"> {line}\n" for line in lines if RESTRICTION.search(line))
    return f"\nFrom the original's card:\n\n{found}" if found else ""


def _known(card: ModelCard | None) -> ModelCardData:
    if card is None:
        return ModelCardData()
    known = ("license", "license_name", "license_link", "language", "base_model", "tags")
    values = {key: card.data.get(key) for key in known}
    return ModelCardData(**{key: value for key, value in values.items() if value})
