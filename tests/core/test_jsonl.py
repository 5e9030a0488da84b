"""Files of JSON lines: bytes split at line feeds, UTF-8 with or without a byte order mark."""

import pytest
from parscale_core.jsonl import read_lines


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_end_at_line_feeds_only(tmp_path, bom, end):
    file = tmp_path / "x.jsonl"
    texts = ["a\u2028b\u2029c", "\u0085", "\x1c", "plain"]
    lines = [f'"{texts[0]}"'.encode(), f'["{texts[1]}"]'.encode(), b"", b'{"a": "\\u001c"}']
    file.write_bytes(bom + end.join([*lines, b'"plain"']))
    assert read_lines(file) == [
        (f"{file}, line 1", texts[0]),
        (f"{file}, line 2", [texts[1]]),
        (f"{file}, line 4", {"a": texts[2]}),
        (f"{file}, line 5", texts[3]),
    ]


@pytest.mark.parametrize(
    ("line", "word"), [(b"{", "not JSON"), (b'"\xff"', "not UTF-8"), (b"[" * 99_999, "not JSON")]
)
def test_a_bad_line_is_named(tmp_path, line, word):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"1\n\n" + line)
    with pytest.raises(ValueError, match=f"x.jsonl, line 3: {word}"):
        read_lines(file)
