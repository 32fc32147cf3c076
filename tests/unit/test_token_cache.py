"""The verified-token cache: what it must never serve, and how much it may keep."""

import gc
import os
import struct
import subprocess
import sys
import weakref

import pytest

from gateway._speedups.token_cache import Principal, TokenCache, siphash

FOREVER = 1 << 40


def principal(subject: str = "alice", client: str = "app", issuer: str = "https://a.test", **more: object) -> Principal:
    arguments: dict = {"scopes": ["a"], "claims": {"sub": subject}, "expires": FOREVER, "seed": 7} | more
    return Principal(subject, client, issuer, **arguments)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, 0x68A914128E01E473), (1, 0x494D5061B4EB912C), (7, 0x1788828CFC7D3A45), (8, 0x07E82B22FEE335E2),
        (15, 0x78E9A2EEB7EA7A08), (16, 0xE088880B15A0C35C), (39, 0x54588E2987C2F08B),
    ],
)
def test_siphash_1_3_of_known_inputs(length: int, expected: int) -> None:
    """Expected: hash(sample) of CPython 3.11, which is SipHash-1-3, with PYTHONHASHSEED=0, which is the key (0, 0)."""
    assert siphash(b"x" * length + bytes([length]), 0, 0) == expected


def test_a_principal_is_what_it_was_made_of() -> None:
    it = principal('a"\u00e9\n', scopes=["x", "y"], headers=b"x-auth-subject: a\r\n", expires=99)
    assert (it.subject, it.client, it.issuer, it.expires) == ('a"\u00e9\n', "app", "https://a.test", 99)
    assert it.scopes == frozenset({"x", "y"})
    assert it.audit_name == rb"a\"\u00e9\n"
    assert it.headers == b"x-auth-subject: a\r\n"


def test_a_principal_cannot_be_changed() -> None:
    claims = {"roles": ["a", {"deep": [1]}], "more": {"x": {}}}
    it = principal(claims=claims)
    claims["roles"].append("admin")
    claims["more"]["x"]["y"] = 1
    assert it.claims["roles"][0] == "a" and len(it.claims["roles"]) == 2
    assert dict(it.claims["more"]["x"]) == {}
    for change in (
        lambda: it.claims.__setitem__("sub", "root"),
        lambda: it.claims["more"].__setitem__("x", 1),
        lambda: it.claims["roles"].append("admin"),
        lambda: setattr(it, "subject", "root"),
    ):
        with pytest.raises((TypeError, AttributeError)):
            change()
    it.__init__("root", "b", "c", [], {}, 1, 1)                 # does nothing a second time
    assert it.subject == "alice"


def test_rate_limit_keys_do_not_run_issuer_and_client_together() -> None:
    keys = {
        principal(issuer=issuer, client=client, seed=seed).key
        for issuer, client, seed in [
            ("ab", "c", 1), ("a", "bc", 1), ("", "abc", 1), ("abc", "", 1), ("a\0", "bc", 1), ("a", "\0bc", 1), ("ab", "c", 2),
        ]
    }
    assert len(keys) == 7
    assert 0 not in keys


def test_rate_limit_keys_are_the_same_in_another_process() -> None:
    code = (
        "from gateway._speedups.token_cache import Principal;"
        "print(Principal('s', 'app', 'https://a.test', [], {}, 1, 7).key)"
    )
    other = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "."}, capture_output=True, check=True)
    assert int(other.stdout) == principal().key


def test_serves_a_token_until_the_second_it_expires() -> None:
    cache, it = TokenCache(1 << 16), principal(expires=100)
    assert cache.put(b"token", it)
    assert cache.lookup(b"token", 99) is it
    assert cache.lookup(b"token", 100) is None
    assert cache.count == 0 and cache.used == 0                # an expired entry is given back at once
    assert (cache.hits, cache.misses) == (1, 1)


def test_never_serves_a_token_that_differs_in_one_byte() -> None:
    cache = TokenCache(1 << 20)
    token = os.urandom(300)
    cache.put(token, principal())
    for position in range(len(token)):
        for bit in (1, 128):
            other = bytearray(token)
            other[position] ^= bit
            assert cache.lookup(bytes(other), 0) is None
    for other in (token[:-1], token[1:], token + b"\0", b"\0" + token, b""):
        assert cache.lookup(other, 0) is None
    assert cache.lookup(bytes(bytearray(token)), 0) is not None


def test_tokens_with_the_same_hash_are_told_apart() -> None:
    """The hash covers the length and the last 64 bytes, so these all collide in all 64 bits."""
    cache = TokenCache(1 << 20)
    tail = os.urandom(64)
    tokens = {struct.pack(">I", n) * 10 + tail: principal(f"user-{n}") for n in range(50)}
    for token, it in tokens.items():
        cache.put(token, it)
    for token, it in tokens.items():
        assert cache.lookup(token, 0) is it
    assert cache.lookup(b"\xff" * 40 + tail, 0) is None


def test_invalidate_kills_every_entry_and_new_ones_live() -> None:
    cache = TokenCache(1 << 20)
    for n in range(20):
        cache.put(b"token-%d" % n, principal())
    cache.invalidate()
    cache.put(b"token-0", principal("bob"))
    assert cache.lookup(b"token-0", 0).subject == "bob"
    assert all(cache.lookup(b"token-%d" % n, 0) is None for n in range(1, 20))
    assert cache.count == 1


def test_stays_within_its_bytes_and_counts_evictions() -> None:
    cache = TokenCache(200_000)
    for n in range(2_000):
        assert cache.put(b"%06d" % n + os.urandom(n % 700), principal(f"user-{n}"))
        assert 0 < cache.used <= cache.max_bytes
    assert cache.evictions == 2_000 - cache.count
    assert 0 < cache.count < 400


def test_large_claims_count_for_what_they_occupy() -> None:
    cache = TokenCache(100_000)
    assert principal(claims={"a": [{} for _ in range(1000)]}).size > 64_000
    assert not cache.put(b"t", principal(claims={"a": [{"b": 1} for _ in range(2000)]}))
    assert cache.count == 0


def test_what_is_used_outlives_what_is_not() -> None:
    cache = TokenCache(40_000)
    cache.put(b"used", principal())
    for n in range(500):
        assert cache.lookup(b"used", 0) is not None
        cache.put(b"%d" % n + bytes(200), principal())
    assert cache.evictions > 400


def test_eviction_ends_when_every_entry_was_just_used() -> None:
    cache = TokenCache(40_000)
    n = 0
    while not cache.evictions:
        cache.put(b"t%d" % n, principal())
        n += 1
    live = [b"t%d" % i for i in range(n) if cache.lookup(b"t%d" % i, 0)]
    assert len(live) > 9
    cache.put(b"new", principal())
    assert cache.lookup(b"new", 0) is not None
    assert cache.used <= cache.max_bytes


def test_putting_a_token_again_replaces_it() -> None:
    cache = TokenCache(1 << 16)
    cache.put(b"t", principal("a"))
    size = cache.used
    cache.put(b"t", principal("b"))
    assert cache.lookup(b"t", 0).subject == "b"
    assert (cache.count, cache.used) == (1, size)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_cache_too_small_for_a_token_stores_nothing(size: int) -> None:
    cache = TokenCache(size)
    assert not cache.put(b"t" * 200, principal())
    assert cache.lookup(b"t" * 200, 0) is None


def test_gives_back_the_principals_it_held() -> None:
    class Scopes(str):
        """A scope whose life can be watched."""

    cache, scope = TokenCache(1 << 16), Scopes("a")
    seen = weakref.ref(scope)
    cache.put(b"t", principal(scopes=[scope]))
    del scope
    assert seen() is not None
    cache.put(b"t", principal())
    assert seen() is None
    scope = Scopes("b")
    seen = weakref.ref(scope)
    cache.put(b"u", principal(scopes=[scope]))
    del scope, cache
    gc.collect()
    assert seen() is None


def test_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(TypeError):
        TokenCache(1000).put(b"t", None)
    with pytest.raises(TypeError):
        TokenCache(1000).put("t", principal())
    with pytest.raises(ValueError, match="negative"):
        TokenCache(-1)
