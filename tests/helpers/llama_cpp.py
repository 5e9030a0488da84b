"""llama.cpp, through xllamacpp's server: what it says of a GGUF file."""

import json
import urllib.request
from pathlib import Path

import numpy as np


class LlamaCpp:
    """A GGUF file opened by llama.cpp on the CPU."""

    def __init__(self, file: Path, context: int = 512):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_gpu_layers, parameters.warmup = context, 0, False
        parameters.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(parameters)

    def logprobs(self, ids: list[int], vocabulary: int) -> np.ndarray:
        """Log-probabilities [vocabulary] of the token after ``ids``."""
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": vocabulary}
        answer = self.post("/completion", body | {"cache_prompt": False})
        likeliest = answer["completion_probabilities"][0]["top_logprobs"]
        values = np.full(vocabulary, -np.inf)
        for entry in likeliest:
            values[entry["id"]] = entry["logprob"]
        return values

    def tokenize(self, text: str) -> list[int]:
        """Token ids, with those that begin or end every text."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return self.post("/tokenize", body)["tokens"]

    def post(self, path: str, body: dict) -> dict:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, kind)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def words(writer, count: int = 320) -> None:
    """A vocabulary of whole words, so that every token is a text, for a GGUF writer."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"▁w{n}" for n in range(3, count))])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([2, 3, 3] + [1] * (count - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
