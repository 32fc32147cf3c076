"""The small languages: what is accepted, how it is stored, what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from gateway.config import values, web
from gateway.config.values import Rate


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10.0),
        ("500ms", 0.5),
        ("1h", 3600.0),
        ("2m", 120.0),
        ("1.5s", 1.5),
        ("1d", 86400.0),
        (0, 0.0),
        ("0s", 0.0),
    ],
)
def test_durations(text: Any, seconds: float) -> None:
    assert values.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10", 10, 1.5, "10 s", "-1s", "s", "1s2", "31d", True, None, "", "1S", "1e3s", "١s"])
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(PydanticCustomError):
        values.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (512, 512),
        ("512", 512),
        ("32KiB", 32768),
        ("1MiB", 1 << 20),
        ("10kB", 10000),
        ("1.5KiB", 1536),
        ("2 GiB", 2 << 30),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert values.parse_size(text) == size and isinstance(values.parse_size(text), int)


@pytest.mark.parametrize("text", [-1, "1KB", "1kb", "1.3B", "KiB", True, None, 1.5, "9" * 40, "1 2"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(PydanticCustomError):
        values.parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100/s", Rate(100, 1.0)),
        ("10/m", Rate(10, 60.0)),
        ("5/h", Rate(5, 3600.0)),
        ("1000/d", Rate(1000, 86400.0)),
        ("5/10s", Rate(5, 10.0)),
    ],
)
def test_rates(text: str, rate: Rate) -> None:
    assert values.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["100", 100, "0/s", "1/0s", "-1/s", "1/y", "a/s", "1/s/s", None])
def test_what_is_no_rate(text: Any) -> None:
    with pytest.raises(PydanticCustomError):
        values.parse_rate(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("[::1]:80", "[::1]:80"),
        ("Payments.Test:80", "payments.test:80"),
        ("[0:0::1]:9", "[::1]:9"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(web.parse_address(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a:0",
        "a:65536",
        ":80",
        "::1:80",
        "http://a:80",
        "a b:80",
        "[x]:80",
        "a:80/",
        "-a:1",
        "1.2.3:80",
        "a:080000",
        80,
        None,
        "a\n:80",
    ],
)
def test_what_is_no_address(text: Any) -> None:
    with pytest.raises(PydanticCustomError):
        web.parse_address(text)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("/", "/"),
        ("/v1/payments/{id}", "/v1/payments/{id}"),
        ("/v1/", "/v1/"),
        ("/%61%7e", "/a~"),
        ("/a%c3%bc", "/a%C3%BC"),
        ("/ü x", "/%C3%BC%20x"),
        ("/a:b@c,d", "/a:b@c,d"),
        ("/%25", "/%25"),
    ],
)
def test_templates_are_stored_normalised(text: str, stored: str) -> None:
    assert web.parse_template(text) == stored


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v1",
        "//",
        "/a//b",
        "/a/../b",
        "/./",
        "/%2e%2E/x",
        "/a%2Fb",
        "/a%5cb",
        "/a%00",
        "/%ff",
        "/%252F",
        "/%25%32%65",
        "/a%",
        "/a%zz",
        "/a;b",
        "/a?b",
        "/a#b",
        "/a\\b",
    ]
    + ["/{id}x", "/x{id}", "/{}", "/{a b}", "/{a}/{a}", "/{1}", "/*", "/a/**", '/"', "/a\x01", None, 5],
)
def test_what_is_no_template(text: Any) -> None:
    with pytest.raises(PydanticCustomError):
        web.parse_template(text)


@pytest.mark.parametrize(("text", "stored"), [("/", "/"), ("/v1", "/v1"), ("/v1/", "/v1"), ("/%76%31", "/v1")])
def test_prefixes_are_stored_without_the_last_slash(text: str, stored: str) -> None:
    assert web.parse_prefix(text) == stored


@pytest.mark.parametrize("text", ["/{id}", "/v1/*", "v1", "/a//", "/.."])
def test_what_is_no_prefix(text: str) -> None:
    with pytest.raises(PydanticCustomError):
        web.parse_prefix(text)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("API.Bank.Test", "api.bank.test"),
        ("*.bank.test", "*.bank.test"),
        ("*", "*"),
        ("127.0.0.1", "127.0.0.1"),
        ("[0::1]", "[::1]"),
        ("a.test.", "a.test"),
    ],
)
def test_host_patterns(text: str, stored: str) -> None:
    assert web.parse_host_pattern(text) == stored


@pytest.mark.parametrize("text", ["", "a:80", "a.*", "**.a", "*a.test", "bänk.test", "a..b", "-a", "a_/b", "*.", 5])
def test_what_is_no_host_pattern(text: Any) -> None:
    with pytest.raises(PydanticCustomError):
        web.parse_host_pattern(text)


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (web.parse_edit_name, "Transfer-Encoding"),
        (web.parse_edit_name, "content_length"),
        (web.parse_edit_name, "Connection"),
        (web.parse_edit_name, "host"),
        (web.parse_edit_name, "upgrade"),
        (web.parse_field_name, "a b"),
        (web.parse_field_name, ""),
        (web.parse_field_name, "a:"),
        (web.parse_field_value, "a\r\nb: c"),
        (web.parse_field_value, "a\x00"),
        (web.parse_field_value, " a"),
        (web.parse_field_value, "ü"),
        (web.parse_field_value, True),
        (web.parse_method, "get"),
        (web.parse_method, "GE T"),
        (web.parse_method, "CONNECT"),
        (web.parse_network, "10.0.0.1/8"),
        (web.parse_network, "10.0.0.0/33"),
        (web.parse_network, "bank.test"),
        (values.parse_name, "a b"),
        (values.parse_name, "-a"),
        (values.parse_flag, "yes"),
        (values.parse_flag, 1),
        (values.parse_int, True),
        (values.parse_int, 1.0),
        (values.parse_workers, 0),
        (values.parse_workers, "two"),
        (values.parse_secret, ""),
    ],
)
def test_what_is_refused(parser: Callable[[Any], Any], text: Any) -> None:
    with pytest.raises(PydanticCustomError):
        parser(text)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::]:80", "localhost:8080", "unix:/run/x.sock"])
def test_binds(text: str) -> None:
    class Holder(BaseModel):
        bind: web.BindText

    bind = Holder.model_validate({"bind": text}).bind
    assert str(bind) == text.replace("localhost", "127.0.0.1")
    assert bind.loopback is (text != "[::]:80")


@pytest.mark.parametrize(
    "text", ["127.0.0.1", ":80", "bank.test:80", "unix:", "unix:/" + "x" * 120, "0.0.0.0:-1", 8080]
)
def test_what_is_no_bind(text: Any) -> None:
    class Holder(BaseModel):
        bind: web.BindText

    with pytest.raises(ValidationError):
        Holder.model_validate({"bind": text})


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("https://auth.test/jwks", True),
        ("http://127.0.0.1:8/jwks", True),
        ("http://[::1]/x", True),
        ("http://localhost/x", True),
        ("http://auth.test/x", False),
        ("https://user:pass@auth.test/x", False),
        ("ftp://auth.test/x", False),
        ("https:///x", False),
        ("https://a b/x", False),
        ("https://a:99999/x", False),
    ],
)
def test_key_sources(text: str, good: bool) -> None:
    class Holder(BaseModel):
        keys: web.KeySource

    if good:
        assert Holder.model_validate({"keys": text}).keys == text
    else:
        with pytest.raises(ValidationError):
            Holder.model_validate({"keys": text})


@pytest.mark.parametrize(("name", "message"), [
    ("x_user", "letters, digits and - only"),
    ("x.user", "letters, digits and - only"),
    ("x" * 65, "letters, digits and - only"),
    ("Authorization", "a meaning of its own"),
    ("x-forwarded-for", "a meaning of its own"),
    ("content_length", "frames the message"),
    ("host", "is not edited here"),
])
def test_headers_that_cannot_carry_a_claim(name: str, message: str) -> None:
    with pytest.raises(PydanticCustomError) as caught:
        web.parse_claim_header(name)
    assert message in str(caught.value)


def test_a_header_for_a_claim_is_lower_case() -> None:
    assert web.parse_claim_header("X-Auth-Subject") == "x-auth-subject"
