"""The words of HTTP in the configuration: addresses, networks, hosts, path templates, header fields, methods.

Strategy: as in `values`: a parser and an Annotated type for each, no input in a message. Paths are stored in the form
in which the engine compares them (`normalise_path` of http1), so that what is authorised is what is forwarded.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

from pydantic import PlainValidator, ValidationInfo

from gateway.config.values import TEXT, base_of, described, fault, parse_path, text_of

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_PLAIN = _UNRESERVED | frozenset("!$&'()*+,=:@")  # RFC 3986 pchar without ";", which servers read in two ways

# Names that say how a message is framed or that live for one hop; a gateway decides them itself (RFC 9110 7.6.1).
# Names under which identities are asserted are deleted from requests in every folded spelling: hence no _ and its like.
CLAIM_HEADER = re.compile(r"[a-z0-9-]{1,64}")
NOT_FOR_CLAIMS = frozenset(
    ["host", "connection", "content-length", "content-type", "content-encoding", "transfer-encoding", "te", "trailer", "upgrade", "keep-alive", "expect", "proxy-authorization", "proxy-connection", "authorization", "cookie", "forwarded", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-request-id", "traceparent", "tracestate", "date", "via"]
)
FRAMING_NAMES = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
        "content-length",
        "expect",
        "host",
        "sec-websocket-key",
        "sec-websocket-version",
        "sec-websocket-accept",
    ]
)


# -- addresses


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect to; `host` is an IP address without brackets or a lower-case name."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def literal(self) -> bool:
        """Tell whether the host is an IP address, which needs no resolution."""
        return is_ip(self.host)


@dataclass(frozen=True, slots=True)
class Bind:
    """Where to listen: an IP address and port (0 means any free one), or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else str(Address(self.host, self.port))

    @property
    def unix(self) -> bool:
        """Tell whether this is a Unix socket."""
        return bool(self.path)

    @property
    def loopback(self) -> bool:
        """Tell whether only this machine can reach it."""
        return self.unix or ipaddress.ip_address(self.host).is_loopback

    @property
    def wildcard(self) -> bool:
        """Tell whether it listens on every interface."""
        return not self.unix and ipaddress.ip_address(self.host).is_unspecified


def is_ip(host: str) -> bool:
    """Tell whether `host` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _split(text: str, hint: str, lowest: int) -> tuple[str, int]:
    match = re.fullmatch(r"(\[([0-9A-Fa-f:.]+)\]|[^\[\]:]*):([0-9]{1,5})", text)
    if not match:
        if text.count(":") > 1 and "[" not in text:
            raise fault("an IPv6 address needs brackets before its port", "write [::1]:8080")
        raise fault("expected host:port", hint)
    port = int(match[3])
    if not lowest <= port <= 65535:
        raise fault(f"a port is between {lowest} and 65535", hint)
    host = (match[2] or match[1]).lower()
    if match[2]:
        try:
            host = str(ipaddress.IPv6Address(host))
        except ValueError:
            raise fault("expected an IPv6 address in the brackets", "write [::1]:8080") from None
    return host, port


def parse_bind(raw: Any, info: ValidationInfo) -> Bind:
    """Return the Bind of `127.0.0.1:8080`, `[::]:8080`, `localhost:8080` or `unix:/path`."""
    hint = "write address:port, such as 127.0.0.1:8080, 0.0.0.0:8080 or [::]:8080, or unix:/path"
    text = text_of(raw, "expected an address to listen on", hint)
    if text.startswith("unix:"):
        path = str(base_of(info) / text[5:])
        if not text[5:] or "\0" in path:
            raise fault("a Unix socket needs a path", "write unix:/run/crossway/admin.sock")
        if len(path.encode()) > 107:
            raise fault("the path of a Unix socket has at most 107 bytes", "choose a shorter folder")
        return Bind(path=path)
    host, port = _split(text, hint, 0)
    host = "127.0.0.1" if host == "localhost" else host
    if not is_ip(host):
        raise fault("a listener needs an IP address, not a host name", hint)
    return Bind(host, port)


def parse_address(raw: Any) -> Address:
    """Return the Address of `host:port` or `[v6]:port`."""
    hint = "write host:port, such as 127.0.0.1:9001, payments.internal:8080 or [::1]:9001"
    text = text_of(raw, "expected host:port", hint)
    if "://" in text:
        raise fault("an endpoint is host:port without a scheme", hint)
    host, port = _split(text, hint, 1)
    if not is_ip(host) and (not _HOST.fullmatch(host) or len(host) > 253 or re.fullmatch(r"[0-9.]+", host)):
        raise fault("the host is neither an IP address nor a host name", hint)
    return Address(host, port)


def parse_network(raw: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return the network of `10.0.0.0/8` or of a single address."""
    hint = "write a network such as 10.0.0.0/8 or 2001:db8::/32, or one address"
    text = text_of(raw, "expected a network", hint)
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise fault("expected a network", hint) from None
    raise fault(
        "an address with bits set below its prefix length",
        "write the network's own address",
        detail=f"meant: {network}",
    )


# -- hosts and paths


def parse_host_pattern(raw: Any) -> str:
    """Return a host to match, lower-cased: a name, `*.suffix`, an address, or `*`."""
    hint = "write api.bank.test, *.bank.test or *"
    text = text_of(raw, "expected a host", hint).lower()
    if text == "*":
        return text
    text = text.removesuffix(".")
    if re.fullmatch(r".*:[0-9]+", text) and not is_ip(text):
        raise fault("a host is matched without its port", hint)
    if not text.isascii():
        raise fault("a host is written in ASCII", "write the xn-- form of the name")
    bare = text.removeprefix("*.")
    if "*" in bare:
        raise fault("a star stands for the first labels only", hint)
    if is_ip(bare.strip("[]")):
        return f"[{ipaddress.ip_address(bare.strip('[]'))}]" if ":" in bare else bare
    if not _HOST.fullmatch(bare) or len(bare) > 253:
        raise fault("not a host name", hint)
    return text


def normalise_segment(segment: str) -> str:
    """Return a path segment as the engine compares it: unreserved bytes unescaped, hex upper-cased."""
    out: list[str] = []
    position = 0
    while position < len(segment):
        char = segment[position]
        if char == "%":
            digits = segment[position + 1 : position + 3]
            if not re.fullmatch(r"[0-9A-Fa-f]{2}", digits):
                raise fault("a % that is not followed by two hex digits", "write %25 for a percent sign")
            byte = chr(int(digits, 16))
            if byte in "/\\\0" or ord(byte) < 32 or ord(byte) == 127:
                raise fault(
                    "an escaped slash, backslash or control byte in a path", "such requests are refused; remove it"
                )
            out.append(byte if byte in _UNRESERVED else f"%{digits.upper()}")
            position += 3
            continue
        if char in _PLAIN:
            out.append(char)
        elif char == " " or ord(char) > 127:
            out.append(quote(char, safe=""))
        else:
            raise fault(
                "a character that cannot stand in a path",
                "escape it as %XX, or remove it",
                detail=f"character {char!r}",
            )
        position += 1
    text = "".join(out)
    try:
        unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise fault("escaped bytes that are not UTF-8", "such requests are refused; escape the UTF-8 form") from None
    if re.search(r"%25(?:00|25|2[Ee]|2[Ff]|5[Cc])", text):
        raise fault("a path that is escaped twice", "such requests are refused; escape it once")
    if text in (".", ".."):
        raise fault("a dot segment in a path", "write the path that it leads to")
    return text


def _segments(raw: Any, what: str) -> list[str]:
    text = text_of(raw, f"expected {what}", f"{what} starts with /")
    if not text.startswith("/"):
        raise fault(f"{what} starts with /", "write it from the root: /v1/payments")
    if "?" in text or "#" in text:
        raise fault(f"{what} holds no query and no fragment", "leave it out; a route matches the query with `query`")
    segments = text[1:].split("/")
    if "" in segments[:-1]:
        raise fault("an empty segment (//) in a path", "write single slashes")
    return segments


def parse_template(raw: Any) -> str:
    """Return a path template in normalised form: `/v1/payments/{id}`; a parameter is a whole segment."""
    names: list[str] = []
    out: list[str] = []
    for segment in _segments(raw, "a path template"):
        if match := re.fullmatch(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", segment):
            if match[1] in names:
                raise fault(
                    "a parameter name that is used twice", "give each parameter its own name", detail=f"{{{match[1]}}}"
                )
            names.append(match[1])
            out.append(segment)
        elif "{" in segment or "}" in segment:
            raise fault("a parameter is a whole segment, a name in braces", "write /v1/payments/{id}")
        elif segment in ("*", "**"):
            raise fault(
                "a star is no wildcard in a path",
                "use `prefix: /v1` for everything below /v1, or a {parameter} for one segment",
            )
        else:
            out.append(normalise_segment(segment))
    return "/" + "/".join(out)


def parse_prefix(raw: Any) -> str:
    """Return a prefix without its trailing slash (`/` stays): it ends at a segment's end either way."""
    out = []
    for segment in _segments(raw, "a prefix"):
        if "{" in segment or "}" in segment:
            raise fault("a prefix has no parameters", "use `path` for a template")
        if segment in ("*", "**"):
            raise fault("a prefix needs no star", "`prefix: /v1` matches /v1 and everything below it")
        out.append(normalise_segment(segment))
    return ("/" + "/".join(out)).rstrip("/") or "/"


def parameters(template: str) -> tuple[str, ...]:
    """Return the names of a template's parameters, in order."""
    return tuple(re.findall(r"\{([^}]*)\}", template))


# -- header fields and methods


def parse_field_name(raw: Any) -> str:
    """Return a header field's name, lower-cased (RFC 9110 5.1)."""
    hint = "letters, digits and - as in x-request-id"
    text = text_of(raw, "expected a header name", hint)
    if not TOKEN.fullmatch(text) or len(text) > 256:
        raise fault("not a header name", hint)
    return text.lower()


def parse_edit_name(raw: Any) -> str:
    """Return the name of a header that a policy may write: not one of framing or of a single hop."""
    name = parse_field_name(raw)
    if name == "host":
        raise fault("the header host is not edited here", "use `rewrite: {host: ...}` or the upstream's `host`")
    # An application server that folds _ to - reads Content_Length as Content-Length.
    if re.sub(r"[^a-z0-9]", "-", name) in FRAMING_NAMES:
        raise fault("a header that frames the message or belongs to one hop", "the gateway writes it itself; remove it")
    return name


def parse_claim_header(raw: Any) -> str:
    """Return the name of a header in which a policy asserts something about the caller."""
    name = parse_edit_name(raw)
    if not CLAIM_HEADER.fullmatch(name):
        raise fault("a header for a claim has letters, digits and - only", "such as x-auth-subject; at most 64 characters")
    if name in NOT_FOR_CLAIMS:
        raise fault("a header with a meaning of its own cannot carry a claim", "choose a name such as x-auth-subject")
    return name


def parse_field_value(raw: Any) -> str:
    """Return a header field's value: printable ASCII, no space at either end."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        raw = str(raw)
    hint = "printable ASCII on one line"
    text = text_of(raw, "expected a header value", f'{hint}; quote it if it is no text: "true"')
    if not all(" " <= char <= "~" for char in text):
        raise fault("a control or non-ASCII character in a header value", hint)
    if text != text.strip(" "):
        raise fault("a header value with space at its end", hint)
    return text


def parse_match_value(raw: Any) -> str:
    """Return the text that a header or query parameter is compared with."""
    if isinstance(raw, (int, float)) and not isinstance(raw, bool):
        raw = str(raw)
    text = text_of(raw, "expected text", 'quote it: "true"')
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise fault("a control character in a value", "it can never match")
    return text


def parse_method(raw: Any) -> str:
    """Return a request method (RFC 9110 9.1: case-sensitive, a token)."""
    text = text_of(raw, "expected a method", "such as GET or POST")
    if not TOKEN.fullmatch(text) or len(text) > 32:
        raise fault("not a method", "such as GET or POST")
    if text != text.upper():
        raise fault("methods are case-sensitive", "write it in upper case: GET, POST")
    if text == "CONNECT":
        raise fault("CONNECT is not offered", "a gateway opens no tunnels; remove it")
    return text


def parse_key_source(raw: Any, info: ValidationInfo) -> str:
    """Return an https URL (http for loopback) unchanged, or a file's path made absolute."""
    hint = "a JWKS file beside this one, or its https:// URL"
    text = text_of(raw, "expected a file or URL", hint)
    if "://" not in text:
        return str(parse_path(raw, info))
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise fault("not a URL", hint) from None
    if (
        url.scheme not in ("http", "https")
        or not url.hostname
        or port == 0
        or not text.isascii()
        or re.search(r"[\s\x00-\x1f]", text)
    ):
        raise fault("not a URL that keys can be fetched from", hint)
    if url.username is not None or url.password is not None:
        raise fault("a URL with a password in it", "keys are public; remove user and password")
    local = url.hostname == "localhost" or (is_ip(url.hostname) and ipaddress.ip_address(url.hostname).is_loopback)
    if url.scheme == "http" and not local:
        raise fault("keys may not travel over plain http", "use https://; http:// is for loopback only")
    return text


BindText = Annotated[Bind, PlainValidator(parse_bind), TEXT, described("address:port or unix:path")]
AddressText = Annotated[Address, PlainValidator(parse_address), TEXT, described("host:port")]
Network = Annotated[
    ipaddress.IPv4Network | ipaddress.IPv6Network, PlainValidator(parse_network), TEXT, described("network")
]
HostPattern = Annotated[str, PlainValidator(parse_host_pattern), described("host")]
Template = Annotated[str, PlainValidator(parse_template), described("path template", pattern="^/")]
Prefix = Annotated[str, PlainValidator(parse_prefix), described("path", pattern="^/")]
FieldName = Annotated[str, PlainValidator(parse_field_name), described("header name")]
EditName = Annotated[str, PlainValidator(parse_edit_name), described("header name")]
ClaimHeader = Annotated[str, PlainValidator(parse_claim_header), described("header name")]
FieldValue = Annotated[str, PlainValidator(parse_field_value), described("header value")]
MatchValue = Annotated[str, PlainValidator(parse_match_value), described("text")]
Method = Annotated[str, PlainValidator(parse_method), described("method")]
KeySource = Annotated[str, PlainValidator(parse_key_source), described("file or https URL")]
