"""Perplexity of exports (with --all-logits) on text that came with Python: English and source.

    python benchmarks/onnx_quality.py DIR... [--streams P] [--tokens 8192] [--piece 512]

Nothing of it is in the text that w8a8 is calibrated on. The text is cut into pieces, each of which
is read from its own beginning; the first DIR is what the others are compared with.
"""

import argparse
import pydoc_data.topics
import sysconfig
from pathlib import Path

import numpy as np
from parscale_export import OnnxModel
from parscale_export.runtime.scoring import token_losses
from tokenizers import Tokenizer

TOPICS = ("execmodel", "types", "objects", "import", "exceptions", "class", "typesseq",
          "specialnames")  # fmt: skip
MODULES = ("textwrap.py", "shelve.py", "heapq.py", "difflib.py", "csv.py", "sched.py")


def texts() -> dict[str, str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return {
        "English": "\n\n".join(pydoc_data.topics.topics[name] for name in TOPICS),
        "Python": "\n\n".join((library / name).read_text(encoding="utf-8") for name in MODULES),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exports", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--streams", type=int)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text (default 8192)")
    parser.add_argument("--piece", type=int, default=512, help="tokens of a piece (default 512)")
    args = parser.parse_args()
    first: dict[str, float] = {}
    for folder in args.exports:
        model = OnnxModel(folder, "cpu", streams=args.streams)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for name, text in texts().items():
            ids = tokenizer.encode(text).ids[: args.tokens]
            starts = range(0, len(ids) - 1, args.piece)
            parts = token_losses(model, [ids[start : start + args.piece] for start in starts])
            perplexity = np.exp(np.concatenate(parts).mean())
            change = perplexity / first.setdefault(name, perplexity) - 1
            print(
                f"{folder} {name}: perplexity {perplexity:.4f} ({change:+.2%}), {len(ids)} tokens"
            )


if __name__ == "__main__":
    main()
