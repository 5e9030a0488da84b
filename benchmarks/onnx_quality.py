"""Perplexity of exports (with --all-logits) on text that came with Python: English and source.

    python benchmarks/onnx_quality.py DIR... [--streams P] [--pieces 16]

Nothing of it is in the text that w8a8 is calibrated on. A piece is 512 tokens.
"""

import argparse
import pydoc_data.topics
import sysconfig
from pathlib import Path

import numpy as np
from parscale_export import OnnxModel
from tokenizers import Tokenizer

LENGTH = 512
TOPICS = ("execmodel", "types", "objects", "import", "exceptions", "class", "typesseq",
          "specialnames")  # fmt: skip
MODULES = ("textwrap.py", "shelve.py", "heapq.py", "difflib.py", "csv.py", "sched.py")


def texts() -> dict[str, str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return {
        "English": "\n\n".join(pydoc_data.topics.topics[name] for name in TOPICS),
        "Python": "\n\n".join((library / name).read_text(encoding="utf-8") for name in MODULES),
    }


def losses(model: OnnxModel, ids: list[int]) -> np.ndarray:
    """Negative log-likelihood of each token after the first, in nats."""
    logits = model.logits(ids)[:-1]
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, np.array(ids)[1:, None], axis=1)[:, 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exports", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--streams", type=int)
    parser.add_argument("--pieces", type=int, default=16)
    args = parser.parse_args()
    for folder in args.exports:
        model = OnnxModel(folder, "cpu", streams=args.streams)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for name, text in texts().items():
            ids = tokenizer.encode(text).ids
            starts = range(0, min(len(ids), args.pieces * LENGTH), LENGTH)
            parts = [losses(model, ids[start : start + LENGTH]) for start in starts]
            print(f"{folder} {name}: perplexity {np.exp(np.concatenate(parts).mean()):.3f}")


if __name__ == "__main__":
    main()
