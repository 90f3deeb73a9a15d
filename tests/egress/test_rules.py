"""Rules for hosts: what they match, how they are combined, what is not one."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.egress.rules import MAX_RULES, EgressPolicy, check_rules, find_refusal, parse_host, parse_network, parse_rule, rule_set

ANY = ("*:*",)


def allows(rule: str, host: str, port: int = 443) -> bool:
    return rule_set((rule,)).allows(parse_host(host), port)


@pytest.mark.parametrize(
    ("rule", "host", "port"),
    [
        ("example.com", "example.com", 443),
        ("example.com", "example.com", 80),
        ("Example.COM.", "eXample.com.", 443),
        ("*.example.com", "a.example.com", 443),
        ("*.example.com", "a.b.example.com", 443),
        ("example.com:8443", "example.com", 8443),
        ("example.com:*", "example.com", 22),
        ("*", "anything.test", 443),
        ("*:*", "anything.test", 9),
        ("bücher.example", "xn--bcher-kva.example", 443),
        ("203.0.113.7", "203.0.113.7", 443),
        ("203.0.113.0/24", "203.0.113.7", 443),
        ("203.0.113.0/24:22", "203.0.113.7", 22),
        ("[2001:db8::1]:8443", "2001:db8:0::1", 8443),
        ("[2001:db8::]/32", "2001:db8::9", 443),
    ],
)
def test_a_rule_matches(rule: str, host: str, port: int) -> None:
    assert allows(rule, host, port)


@pytest.mark.parametrize(
    ("rule", "host", "port"),
    [
        ("example.com", "a.example.com", 443),
        ("example.com", "notexample.com", 443),
        ("example.com", "example.com.evil.test", 443),
        ("example.com", "example.com", 8443),
        ("*.example.com", "example.com", 443),
        ("*.example.com", "notexample.com", 443),
        ("example.com:8443", "example.com", 443),
        ("*", "anything.test", 22),
        ("*:*", "203.0.113.7", 443),
        ("203.0.113.7", "203.0.113.8", 443),
        ("203.0.113.7", "2001:db8::1", 443),
    ],
)
def test_a_rule_does_not_match(rule: str, host: str, port: int) -> None:
    assert not allows(rule, host, port)


@pytest.mark.parametrize(
    "text",
    [
     "", " ", "http://example.com", "example.com/path", "example.com:0", "example.com:99999", "example.com:http", "a b", "*.*",
     "ex*mple.com",
     "*.203.0.113.7", "0x7f.1", "127.1", "2130706433", "017700000001", "1.2.3.4.5", "10.0.0.1/8", "[::1", "::1]", "fe80::1%eth0", "-a.test",
     "a..b", "user@example.com", "a" * 64 + ".test", "example.com:443:443", "x" * 400, "[example.com]", "exa\nmple.com",
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_rule(text)


@pytest.mark.parametrize(
    "text",
    [
        "127.1",
        "0x7f.0.0.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "127.0.0.01",
        "1.2.3",
        "256.1.1.1",
        "1.2.3.4.",
        "foo.0x1",
        "::g",
        "a.1",
    ],
)
def test_no_odd_spelling_of_an_address_is_a_host(text: str) -> None:
    if text == "1.2.3.4.":  # a dot at the end belongs to names
        assert parse_host(text) == ipaddress.ip_address("1.2.3.4")
        return
    with pytest.raises(ValueError, match="not an address"):
        parse_host(text)


@given(st.text(max_size=60))
def test_any_text_is_a_host_or_a_valueerror(text: str) -> None:
    try:
        found = parse_host(text)
    except ValueError:
        return
    if isinstance(found, str):
        assert found == found.lower()
        assert not set(found) & set("/:@[]% \r\n\0")


def test_a_host_needs_the_agent_the_operator_and_no_denial() -> None:
    policy = EgressPolicy(allow=("example.com", "*.test"), deny=("bad.test", "half.test:22"))

    def reason(host: str, asked: tuple[str, ...], denied: tuple[str, ...] = (), port: int = 443) -> str | None:
        refusal = find_refusal(parse_host(host), port, asked, denied, policy)
        return refusal.reason if refusal is not None else None

    assert reason("example.com", ("example.com",)) is None
    assert reason("a.test", ANY) is None
    assert reason("example.com", ()) == "not_asked"
    assert reason("example.com", ("other.com",)) == "not_asked"
    assert reason("other.com", ANY) == "not_allowed"
    assert reason("bad.test", ANY) == "denied"
    assert reason("bad.test", ANY, port=8443) == "denied"
    assert reason("half.test", ANY) is None
    assert reason("half.test", ANY, port=22) == "denied"
    assert reason("a.test", ANY, ("a.test",)) == "denied"
    assert reason("a.test", ANY, port=8443) == "port"


def test_nothing_is_allowed_without_a_policy() -> None:
    assert find_refusal("example.com", 443, ANY, (), EgressPolicy()) is not None


def test_a_refusal_says_what_to_add_and_where() -> None:
    by_agent = find_refusal("example.com", 443, (), (), EgressPolicy(allow=ANY))
    by_operator = find_refusal("example.com", 8443, ANY, (), EgressPolicy())
    assert by_agent is not None
    assert by_operator is not None
    assert 'Add "example.com" to sandbox.network.allowedDomains in .claude/settings.json' in by_agent.hint
    assert 'Add "example.com:8443" to `allow` under [egress]' in by_operator.hint


def test_a_network_with_bits_beyond_its_mask_is_refused() -> None:
    assert str(parse_network("10.1.0.0/16")) == "10.1.0.0/16"
    with pytest.raises(ValueError, match="write it like"):
        parse_network("10.1.2.3/16")


def test_more_rules_than_can_be_looked_at_for_each_connection_are_refused() -> None:
    assert len(check_rules((f"h{number}.test" for number in range(MAX_RULES)), ValueError)) == MAX_RULES
    with pytest.raises(ValueError, match="more than"):
        check_rules((f"h{number}.test" for number in range(MAX_RULES + 1)), ValueError)
