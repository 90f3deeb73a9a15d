"""What of a secret is found in a stream, however it is cut, and that nothing else can be told from how the stream comes."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.egress.redaction import Redactor, needles

SECRET = "s3cr3t/Token+Value=&<"


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("after", range(4))
def test_a_secret_is_found_inside_base64_at_any_place(before: int, after: int) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(b"x" * before + SECRET.encode() + b"y" * after)
        shown = Redactor(needles(SECRET)).redact(text)
        assert len(shown) == len(text)
        assert shown.count(b"*") >= len(SECRET) * 8 // 6 - 1


@pytest.mark.parametrize("form", [
    SECRET, quote(SECRET, safe=""), quote(SECRET), "s3cr3t%2fToken%2bValue%3d%26%3c", "s3cr3t/Token%2bValue%3d%26%3c",
    json.dumps(SECRET), json.dumps(SECRET).replace("/", "\\/"), html.escape(SECRET), html.escape(SECRET, quote=False),
])  # fmt: skip
def test_a_secret_is_found_as_texts_write_it(form: str) -> None:
    assert SECRET[:6].encode() not in Redactor(needles(SECRET)).redact(f"a {form} b".encode())


@given(st.lists(st.integers(0, 60), max_size=8), st.binary(max_size=20), st.binary(max_size=20))
def test_a_stream_is_redacted_wherever_it_is_cut(cuts: list[int], before: bytes, after: bytes) -> None:
    text = before + SECRET.encode() + after
    redactor, shown, last = Redactor(needles(SECRET)), b"", 0
    for cut in sorted(cuts):
        shown += redactor.feed(text[last:cut])
        last = max(last, cut)
    shown += redactor.feed(text[last:]) + redactor.flush()
    assert shown == before + b"*" * len(SECRET) + after


@given(st.binary(max_size=200))
def test_how_much_is_held_back_does_not_depend_on_what_it_is(noise: bytes) -> None:
    """Otherwise a program that gets its own guesses back could tell how the secret begins."""
    guess = (SECRET.encode() * 20)[: len(noise)]
    if SECRET.encode() in guess:
        guess = guess[::-1]
    assert len(Redactor(needles(SECRET)).feed(noise)) == len(Redactor(needles(SECRET)).feed(guess))


def test_without_secrets_nothing_is_held_back() -> None:
    redactor = Redactor(())
    assert redactor.feed(b"abc") == b"abc"
    assert not redactor.holds
