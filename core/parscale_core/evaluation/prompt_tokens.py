"""Where a prompt may be cut so that a model can go on from it as from any text it has learnt."""

from typing import Any

FAR = 16  # tokens: no vocabulary joins more than a few characters over a prompt's end


def cut_prompt(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], str]:
    """The prompt's tokens, and what they say, up to the last boundary that its answer has too.

    In Qwen2.5's vocabulary ``\"\"\"`` and the line's end after it are one token; in SmolLM2's the
    line's end is one with the indentation that follows. A model that is given half a token goes on
    otherwise than with the other half, so the prompt ends before what is joined to its answer.

    Args:
        prompt: the text, with the line's end after it, if any.
        continuation: how an answer begins. The text of the result is a beginning of the prompt.
    """
    whole = prompt + continuation
    ids = list(tokenizer.encode(whole))
    shortest = max(0, len(ids) - len(tokenizer.encode(continuation)) - FAR)
    for count in range(len(ids), shortest, -1):
        text = tokenizer.decode(
            ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if text and prompt.startswith(text):
            return ids[:count], text
    return list(tokenizer.encode(prompt)), prompt
