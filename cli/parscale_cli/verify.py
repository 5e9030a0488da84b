"""``parscale verify``: an ONNX export beside the model it was made from."""

import json
from pathlib import Path

import click
from parscale_core.error_text import not_finite

from parscale_cli.options.command import argument, command, heading, option
from parscale_cli.options.common import FOLDER, check_option, json_option, provider_option
from parscale_cli.options.types import Real, Whole
from parscale_cli.prompts import as_text

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees Celsius at sea level. On a mountain, where the air",
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat.",
)
# Of an export's precision: the largest logit difference, and the mean KL divergence in nats.
TOLERANCES = {
    "fp32": (1e-3, 1e-6),
    "fp16": (0.25, 1e-3),
    "bf16": (2.0, 2e-2),
    "int8": (float("inf"), 2e-2),
    "w8a8": (float("inf"), 2e-2),
    "int4": (float("inf"), 0.4),
}


@command()
@argument("export", metavar="DIR", type=click.Path(path_type=Path))
@heading("Model")
@option("--against", required=True, metavar="DIR|NAME", help="The model it was made from.")
@option(
    "--adapter",
    type=FOLDER,
    metavar="DIR",
    help="The stream adapter that the model has to be taken with.",
)
@heading("Prompts")
@option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Compare on this text; may be given several times.",
)
@option("-n", "--tokens", type=Whole(1), default=32, help="Greedy tokens to follow each prompt.")
@heading("Tolerance")
@option(
    "--max-difference",
    type=Real(0),
    metavar="LOGIT",
    help="Largest logit difference to accept; by default it depends on the precision.",
)
@option(
    "--max-kl",
    type=Real(0),
    metavar="NATS",
    help="Largest mean KL divergence to accept; by default likewise.",
)
@provider_option
@check_option
@json_option
@click.pass_context
def verify(
    ctx, export, against, adapter, prompts, tokens, max_difference, max_kl, provider, check, as_json
):
    """Compare an ONNX export with its model on real prompts; exit 1 where they differ too much."""
    from parscale_export import OnnxModel
    from parscale_export.runtime.session import find_graph

    find_graph(export)  # so that what is no export is found before a model is loaded
    reference = _Reference(against, adapter)
    model = OnnxModel(export, provider, streams=reference.streams, check=check)
    if model.vocab_size != reference.vocab_size:
        raise ValueError(
            f"{export} has {model.vocab_size} tokens, but {against} has {reference.vocab_size}: "
            "it was made from another model"
        )
    report = _compare(model, reference, _token_ids(reference, prompts), tokens)
    default_difference, default_kl = TOLERANCES[model.precision]
    limit = default_difference if max_difference is None else max_difference
    kl_limit = default_kl if max_kl is None else max_kl
    report["within_tolerance"] = (
        report["finite"] and report["max_difference"] <= limit and report["mean_kl"] <= kl_limit
    )
    report["precision"] = model.precision
    if as_json:
        click.echo(json.dumps(report))
    elif report["finite"]:
        _print(report, limit, kl_limit)
    if not report["finite"]:
        raise ArithmeticError(not_finite(f"{export}: the logits have"))
    if not report["within_tolerance"]:
        ctx.exit(1)


class _Reference:
    """The model in MLX, in float32."""

    def __init__(self, path_or_name: str, adapter: Path | None):
        from parscale_mlx import load_model
        from parscale_mlx.adapter import load_adapter, with_streams

        import mlx.core as mx
        from parscale_core.checkpoint.folder import find_folder

        self.folder = find_folder(path_or_name)
        self.model, config = load_model(self.folder, dtype=mx.float32)
        if adapter is not None:
            self.model = with_streams(self.model, load_adapter(adapter, backbone=self.folder))
        self.streams, self.vocab_size = self.model.args.streams, config["vocab_size"]

    def greedy(self, prompt: list[int], tokens: int):
        """Greedy tokens, and the logits [tokens, vocab] that chose them."""
        import mlx.core as mx
        import numpy as np

        cache, ids = self.model.make_cache(), list(prompt)
        logits: list[np.ndarray] = []
        for _ in range(tokens):
            last = self.model(mx.array([ids[-1:] if logits else ids]), cache=cache)[0, -1]
            logits.append(np.array(last.astype(mx.float32)))
            if not np.isfinite(logits[-1]).all():
                raise ArithmeticError(not_finite(f"{self.folder}: the logits have"))
            ids.append(int(logits[-1].argmax()))
        return ids[len(prompt) :], np.stack(logits)


def _token_ids(reference: _Reference, prompts: tuple[str, ...]) -> list[list[int]]:
    file = reference.folder / "tokenizer.json"
    if not file.is_file():
        if prompts:
            raise ValueError(f"{reference.folder}: no tokenizer.json to encode --prompt with")
        click.echo("no tokenizer.json: comparing on arbitrary tokens", err=True)
        return [[(17 * n * n + 5 * n + k) % reference.vocab_size for n in range(9 + 4 * k)]
                for k in range(len(PROMPTS))]  # fmt: skip
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return [ids for text in prompts or PROMPTS if (ids := tokenizer.encode(as_text(text)).ids)]


def _compare(model, reference: _Reference, prompts: list[list[int]], tokens: int) -> dict:
    import numpy as np
    from parscale_core.engine.logprobs import log_softmax
    from parscale_core.progress import hidden
    from tqdm import tqdm

    differences, divergences, parts = [], [], None
    for n, prompt in enumerate(tqdm(prompts, desc="comparing", disable=hidden(), leave=False)):
        expected_tokens, expected = reference.greedy(prompt, tokens)
        # Both follow the reference's tokens, so that one early difference does not hide the rest.
        actual = model.continuation_logits(prompt, expected_tokens[:-1])
        if not np.isfinite(actual).all():
            measures = ("max_difference", "mean_kl", "max_kl", "greedy_parts_at")
            return {"prompts": n + 1, "tokens": tokens, "finite": False} | dict.fromkeys(measures)
        differences.append(float(np.abs(actual - expected).max()))
        p, q = log_softmax(expected), log_softmax(actual)
        divergences.append((np.exp(p) * (p - q)).sum(-1))
        wrong = np.flatnonzero(actual.argmax(-1) != np.array(expected_tokens))
        if parts is None and wrong.size:
            at = int(wrong[0])
            own, theirs = np.exp(p[at, [expected_tokens[at], int(actual[at].argmax())]])
            parts = {"prompt": n, "token": at, "probability": float(own), "other": float(theirs)}
    every = np.concatenate(divergences)
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "finite": True,
        "max_difference": max(differences),
        "mean_kl": max(float(every.mean()), 0.0),
        "max_kl": max(float(every.max()), 0.0),
        "greedy_parts_at": parts,
    }


def _print(report: dict, limit: float, kl_limit: float) -> None:
    parts = report["greedy_parts_at"]
    click.echo(f"largest logit difference: {report['max_difference']:.3g}")
    click.echo(f"KL divergence: {report['mean_kl']:.3g} nats, at most {report['max_kl']:.3g}")
    click.echo(
        f"greedy text: the same for {report['prompts']} prompts of {report['tokens']} tokens"
        if parts is None
        else f"greedy text: parts at token {parts['token'] + 1} after prompt "
        f"{parts['prompt'] + 1}, of {parts['probability']:.1%} in the model, "
        f"for one of {parts['other']:.1%}"
    )
    verdict = "within" if report["within_tolerance"] else "beyond"
    # Rounded weights are judged by the divergence alone, unless asked otherwise.
    logits = "" if limit == float("inf") else f"logits {limit:g}, "
    click.echo(
        f"{verdict} the tolerance of {report['precision']}: {logits}KL divergence {kl_limit:g} nats"
    )
