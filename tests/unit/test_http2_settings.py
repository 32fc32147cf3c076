"""What an HTTP/2 connection is allowed, and which upstreams' connections are alike."""

from typing import Any

import pytest

from gateway._speedups.exchange import ListenerEntry
from gateway._speedups.http2_settings import Http2
from gateway._speedups.pool import SHARED_WINDOW, Endpoint, Upstream
from gateway._speedups.route_trie import RouteTrie
from gateway._speedups.tls import TlsUpstream


def test_what_nobody_sets_is_a_listeners_default() -> None:
    settings = Http2()
    assert (settings.streams, settings.window, settings.connection_window) == (100, 262144, 1048576)
    assert (settings.resets, settings.frames, settings.clear) == (100, 1000, False)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("streams", 1, 10000), ("window", 16384, 2**31 - 1), ("connection_window", 65535, 2**31 - 1), ("resets", 1, 10**6),
     ("frames", 1, 10**6)],
)  # fmt: skip
def test_a_number_out_of_its_bounds_is_refused(name: str, least: int, most: int) -> None:
    for good in (least, most):
        assert getattr(Http2(**{name: good}), name) == good
    for bad in (least - 1, most + 1, -1, 2**40):
        with pytest.raises(ValueError, match=name):
            Http2(**{name: bad})


def test_times_out_of_their_bounds_are_refused() -> None:
    assert (Http2().ping_us, Http2().ping_timeout_us) == (0, 10_000_000)
    assert (Http2(ping=1.5, ping_timeout=0.1).ping_us, Http2(ping=3600, ping_timeout=0.1).ping_timeout_us) == (1_500_000, 100_000)
    for name, bad in (("ping", 0.9), ("ping", 3601), ("ping", -1), ("ping_timeout", 0), ("ping_timeout", 0.05), ("ping_timeout", 3601)):
        with pytest.raises(ValueError, match=name):
            Http2(**{name: bad})


def test_settings_with_the_same_numbers_are_equal() -> None:
    assert Http2(streams=7) == Http2(streams=7)
    assert hash(Http2(streams=7)) == hash(Http2(streams=7))
    for other in ({"streams": 8}, {"window": 65535}, {"connection_window": 65535}, {"resets": 1}, {"frames": 1}, {"clear": True}, {"ping": 9}, {"ping_timeout": 9}):
        assert Http2(streams=7) != Http2(**{"streams": 7, **other})


def upstream(**settings: Any) -> Upstream:
    return Upstream("u", [Endpoint("127.0.0.1:80")], **settings)


def test_connections_that_speak_another_protocol_are_not_taken_over() -> None:
    assert upstream(protocol="http2").equivalent(upstream(protocol="http2"))
    for other in ("http1", "grpc"):
        assert not upstream(protocol="http2").equivalent(upstream(protocol=other))
        assert not upstream(protocol=other).equivalent(upstream(protocol="http2"))


def test_connections_that_announced_other_windows_are_not_taken_over() -> None:
    one, same, other = (upstream(protocol="http2", http2=Http2(window=size)) for size in (65535, 65535, 65536))
    assert one.equivalent(same)
    assert not one.equivalent(other)


def test_an_upstream_has_http2_settings_exactly_when_it_speaks_http2() -> None:
    assert upstream(protocol="http1", http2=Http2()).http2 is None
    assert upstream(protocol="http2").http2 == Http2(connection_window=SHARED_WINDOW)
    assert upstream(protocol="grpc", http2=Http2(streams=5)).http2 == Http2(streams=5)
    assert [upstream(protocol=name).protocol_name for name in ("http1", "http2", "grpc")] == ["http1", "http2", "grpc"]
    with pytest.raises(KeyError):
        upstream(protocol="http3")


def test_a_listener_speaks_http2_when_it_has_settings_for_it() -> None:
    assert ListenerEntry("public", RouteTrie([])).http2 is None
    assert ListenerEntry("public", RouteTrie([]), http2=Http2(clear=True)).http2 == Http2(clear=True)


def test_an_upstream_offers_the_protocols_it_was_given() -> None:
    assert TlsUpstream(digest=b"", verify=False).alpn == ("http/1.1",)
    assert TlsUpstream(digest=b"", verify=False, alpn=("h2",)).alpn == ("h2",)
