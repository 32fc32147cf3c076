"""gRPC-Web through a gateway to a service of grpcio: what a browser sends, and what it reads."""

from __future__ import annotations

import base64
import contextlib
import gc
import socket
import struct
import threading
from collections.abc import Iterator

import grpc
import h2.config
import h2.connection
import h2.events
import httpx
import pytest
import sonora.client
import sonora.protocol

from tests.integration.bank import WatchedGateway
from tests.integration.faults import connect
from tests.integration.grpc_bank import SERVICE, GrpcBank
from tests.integration.processes import PATIENCE

BINARY, TEXT = "application/grpc-web+proto", "application/grpc-web-text+proto"
ORIGIN = "https://app.bank.test"
Frames = list[tuple[int, bytes]]


def message(payload: bytes, flag: int = 0) -> bytes:
    return struct.pack("!BI", flag, len(payload)) + payload


def frames(body: bytes) -> Frames:
    """Split a body into (flag, payload); it must hold nothing else."""
    found = []
    while body:
        flag, length = struct.unpack_from("!BI", body)
        assert len(body) >= 5 + length
        found.append((flag, body[5 : 5 + length]))
        body = body[5 + length :]
    return found


def decoded(text: bytes) -> bytes:
    """Base64 as browsers' clients read it: groups of four, each maybe padded."""
    assert len(text) % 4 == 0
    return b"".join(base64.b64decode(text[i : i + 4], validate=True) for i in range(0, len(text), 4))


def trailers(frame: tuple[int, bytes]) -> dict[str, str]:
    assert frame[0] == 0x80
    pairs = (line.split(b": ", 1) for line in frame[1].split(b"\r\n") if line)
    return {name.decode(): value.decode() for name, value in pairs}


class Web:
    """A gateway before a bank, and clients of gRPC-Web over either version of HTTP."""

    def __init__(self, gateway: WatchedGateway, bank: GrpcBank) -> None:
        self.gateway = gateway
        self.bank = bank

    def url(self, method: str) -> str:
        return f"http://127.0.0.1:{self.gateway.port()}/{SERVICE}/{method}"

    def call(self, method: str, body: bytes, kind: str = BINARY, *, http2: bool = False, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with httpx.Client(http1=not http2, http2=http2, timeout=PATIENCE) as client:
            return client.post(self.url(method), content=body, headers={"content-type": kind, "x-grpc-web": "1", **named})


def configuration(upstream: str, port: int) -> str:
    return (
        "version: 1\nworkers: 1\nadmin: {bind: 127.0.0.1:0}\n"
        "listeners: {public: {bind: 127.0.0.1:0, http2: {clear: true}}}\n"
        f"upstreams: {{bank: {{targets: ['127.0.0.1:{port}'], {upstream}}}}}\n"
        f"policies:\n  browsers: {{cors: {{origins: ['{ORIGIN}']}}}}\n  web: {{grpc_web: {{request: 64KiB}}}}\n"
        "  closed: {ip: {deny: 127.0.0.1/32}}\n"
        f"routes:\n  - {{name: payments, match: {{grpc: {{service: {SERVICE}}}}}, policies: [browsers, web], upstream: bank}}\n"
        f"  - {{name: closed, match: {{grpc: {{service: {SERVICE}, method: Closed}}}}, policies: [browsers, closed, web], upstream: bank}}\n"
        f"  - {{name: small, match: {{grpc: {{service: {SERVICE}, method: Small}}}}, policies: [browsers, {{grpc_web: {{request: 1KiB}}}}], upstream: bank}}\n"
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("web")
    bank = GrpcBank()
    try:
        (folder / "edge.yaml").write_text(configuration("protocol: grpc", bank.port))
        with WatchedGateway(folder / "edge.yaml") as gateway:
            yield Web(gateway, bank)
    finally:
        bank.close()


@pytest.fixture
def web(shared: Web) -> Iterator[Web]:
    shared.bank.go_on.clear()
    yield shared
    shared.bank.go_on.set()
    shared.gateway.calm()


both = pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])


# -- calls


@both
def test_a_call_in_binary(web: Web, http2: bool) -> None:
    answer = web.call("Transfer", message(b"100 EUR"), http2=http2)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/grpc-web+proto"
    assert answer.headers["x-begin"] == "yes"
    first, last = frames(answer.content)
    assert first == (0, b"paid 100 EUR")
    said = trailers(last)
    assert (said["grpc-status"], said["x-end"], said["x-raw-bin"]) == ("0", "done", "AP8")
    assert web.bank.metadata["x-grpc-web"] == "1"


@both
@pytest.mark.parametrize("size", [0, 1, 2, 3, 40_000])
def test_a_call_in_text(web: Web, http2: bool, size: int) -> None:
    payload = bytes(number % 251 for number in range(size))
    answer = web.call("Transfer", base64.b64encode(message(payload)), TEXT, http2=http2)
    assert answer.headers["content-type"] == "application/grpc-web-text+proto"
    first, last = frames(decoded(answer.content))
    assert first == (0, b"paid " + payload)
    assert trailers(last)["grpc-status"] == "0"


@both
def test_the_client_says_in_which_form_it_reads(web: Web, http2: bool) -> None:
    answer = web.call("Transfer", message(b"1"), http2=http2, accept="application/grpc-web-text")
    assert answer.headers["content-type"] == "application/grpc-web-text+proto"
    assert frames(decoded(answer.content))[0] == (0, b"paid 1")


@both
@pytest.mark.parametrize("kind", [BINARY, TEXT])
def test_a_refusal_of_the_service(web: Web, http2: bool, kind: str) -> None:
    body = message(b"1")
    answer = web.call("Refuse", body if kind == BINARY else base64.b64encode(body), kind, http2=http2)
    assert answer.status_code == 200
    said = dict(answer.headers)
    if "grpc-status" not in said:
        (only,) = frames(answer.content if kind == BINARY else decoded(answer.content))
        said = trailers(only)
    assert (said["grpc-status"], said["grpc-message"]) == ("9", "not 100 %25 covered: %C3%A9")


@both
def test_an_answer_without_messages(web: Web, http2: bool) -> None:
    answer = web.call("Nothing", message(b"1"), http2=http2)
    (only,) = frames(answer.content)
    assert trailers(only)["grpc-status"] == "0"


@both
@pytest.mark.parametrize("kind", [BINARY, TEXT])
def test_messages_of_a_stream_come_as_they_are_sent(web: Web, http2: bool, kind: str) -> None:
    body = message(b"5")
    headers = {"content-type": kind}
    read = decoded if kind == TEXT else bytes
    with httpx.Client(http1=not http2, http2=http2, timeout=PATIENCE) as client, client.stream(
        "POST", web.url("Watch"), content=base64.b64encode(body) if kind == TEXT else body, headers=headers
    ) as answer:
        pieces = answer.iter_raw()
        got = b""
        while len(got) < len(message(b"0") if kind == BINARY else base64.b64encode(message(b"0"))):
            got += next(pieces)
        assert frames(read(got)) == [(0, b"0")]         # the service waits: nothing else can be there
        web.bank.go_on.set()
        got += b"".join(pieces)
    found = frames(read(got))
    assert [payload for _, payload in found[:-1]] == [b"%d" % number * (1 + number * 7) for number in range(5)]
    assert trailers(found[-1])["grpc-status"] == "0"


@both
def test_a_stream_that_fails_says_so_at_its_end(web: Web, http2: bool) -> None:
    first, last = frames(web.call("Stop", message(b"1"), http2=http2).content)
    assert first == (0, b"one")
    assert (trailers(last)["grpc-status"], trailers(last)["grpc-message"]) == ("15", "gone")


@both
def test_the_deadline_of_the_client_reaches_the_service(web: Web, http2: bool) -> None:
    web.call("Transfer", message(b"1"), http2=http2, grpc_timeout="7S")
    assert web.bank.remaining is not None and 1 < web.bank.remaining < 8                # grpcio rounds it up
    answer = web.call("Watch", message(b"2"), http2=http2, grpc_timeout="5x")
    assert (answer.status_code, answer.headers["grpc-status"]) == (200, "3")


def test_grpc_itself_passes_as_it_is(web: Web) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{web.gateway.port()}") as channel:
        transfer = channel.unary_unary(f"/{SERVICE}/Transfer")
        assert transfer(b"5", timeout=PATIENCE) == b"paid 5"
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{SERVICE}/Refuse")(b"5", timeout=PATIENCE)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_client_that_nobody_here_wrote(web: Web) -> None:
    with sonora.client.insecure_web_channel(f"http://127.0.0.1:{web.gateway.port()}") as channel:
        transfer = channel.unary_unary(f"/{SERVICE}/Transfer", bytes, bytes)
        assert transfer(b"7 EUR") == b"paid 7 EUR"
        web.bank.go_on.set()
        watch = channel.unary_stream(f"/{SERVICE}/Watch", bytes, bytes)
        assert list(watch(b"3")) == [b"0", b"1" * 8, b"2" * 15]
        with pytest.raises(sonora.protocol.WebRpcError) as refused:
            channel.unary_unary(f"/{SERVICE}/Refuse", bytes, bytes)(b"1")
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert refused.value.details() == "not 100 % covered: é"
        with pytest.raises(sonora.protocol.WebRpcError) as closed:
            channel.unary_unary(f"/{SERVICE}/Closed", bytes, bytes)(b"1")
        assert closed.value.code() == grpc.StatusCode.PERMISSION_DENIED
    del transfer, watch, refused, closed
    gc.collect()                                # it leaves the connection of a stream to the collector


# -- refusals of the gateway


@both
@pytest.mark.parametrize("kind", [BINARY, TEXT])
def test_a_policy_refuses_in_the_client_s_language(web: Web, http2: bool, kind: str) -> None:
    calls = web.bank.calls
    answer = web.call("Closed", message(b"1"), kind, http2=http2, origin=ORIGIN)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == kind
    assert answer.headers["grpc-status"] == "7" and answer.headers["grpc-message"]
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert web.bank.calls == calls


@both
@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        (TEXT, b"not base64", "3"), (TEXT, b"AAAAAAEx====", "3"), (TEXT, b"AAAAAA", "3"), (BINARY, message(b"1")[:-1], "3"),
        (BINARY, message(b"1", 0x80), "3"), (BINARY, message(b"1", 2), "3"), 
    ],
)  # fmt: skip
def test_a_body_that_is_no_call_never_reaches_the_service(web: Web, http2: bool, kind: str, body: bytes, status: str) -> None:
    calls = web.bank.calls
    answer = web.call("Transfer", body, kind, http2=http2)
    assert (answer.status_code, answer.headers["grpc-status"]) == (200, status)
    assert answer.headers["content-type"] == kind
    assert web.bank.calls == calls
    assert frames(web.call("Transfer", message(b"1")).content)[0] == (0, b"paid 1")


@both
@pytest.mark.parametrize("kind", [BINARY, TEXT])
def test_a_request_above_the_limit_never_reaches_the_service(web: Web, http2: bool, kind: str) -> None:
    """It fits one frame, so that no client is still sending when it is refused."""
    for size, status in ((900 if kind == BINARY else 700, "12"), (1100, "8")):
        body = message(bytes(size))
        answer = web.call("Small", body if kind == BINARY else base64.b64encode(body), kind, http2=http2)
        said = answer.headers.get("grpc-status")
        if said is None:
            said = trailers(frames(answer.content if kind == BINARY else decoded(answer.content))[-1])["grpc-status"]
        assert said == status                   # the service has no such method


@both
@pytest.mark.parametrize("kind", ["application/json", "application/grpc-webs", "application/grpc-web-text+"])
def test_what_is_no_grpc_is_refused(web: Web, http2: bool, kind: str) -> None:
    calls = web.bank.calls
    answer = web.call("Transfer", message(b"1"), kind, http2=http2)
    assert answer.status_code == 415
    assert web.bank.calls == calls


def test_requests_follow_each_other_on_one_connection(web: Web) -> None:
    with httpx.Client(timeout=PATIENCE) as client:
        for number in range(20):
            kind, body = (TEXT, base64.b64encode(message(b"%d" % number))) if number % 2 else (BINARY, message(b"%d" % number))
            answer = client.post(web.url("Transfer"), content=body, headers={"content-type": kind})
            body = answer.content if kind == BINARY else decoded(answer.content)
            assert frames(body)[0] == (0, b"paid %d" % number)
        client.post(web.url("Transfer"), content=b"!", headers={"content-type": TEXT})
        assert frames(client.post(web.url("Transfer"), content=message(b"x"), headers={"content-type": BINARY}).content)[0][1] == b"paid x"


def test_a_body_in_chunks_of_single_bytes(web: Web) -> None:
    body = base64.b64encode(message(b"100 EUR"))
    with connect(web.gateway.port()) as stream:
        stream.send(
            f"POST /{SERVICE}/Transfer HTTP/1.1\r\nhost: x\r\ncontent-type: {TEXT}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        )
        for byte in body:
            stream.send(b"1\r\n%c\r\n" % byte)
        stream.send(b"0\r\n\r\n")
        answer = stream.answer()
    assert frames(decoded(answer.body))[0] == (0, b"paid 100 EUR")


# -- browsers of other origins


@both
def test_a_browser_gets_leave_for_what_its_client_sends(web: Web, http2: bool) -> None:
    with httpx.Client(http1=not http2, http2=http2, timeout=PATIENCE) as client:
        answer = client.options(web.url("Transfer"), headers={
            "origin": ORIGIN, "access-control-request-method": "POST",
            "access-control-request-headers": "content-type,grpc-timeout,x-grpc-web,x-user-agent",
        })  # fmt: skip
    assert answer.status_code == 204
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert allowed >= {"content-type", "grpc-timeout", "x-grpc-web", "x-user-agent"}
    answer = web.call("Transfer", message(b"1"), http2=http2, origin=ORIGIN)
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert exposed >= {"grpc-status", "grpc-message"}


# -- services that misbehave


class OddService:
    """A server of HTTP/2 (the h2 library) that answers every request with the same head, pieces of a body and trailers."""

    def __init__(self) -> None:
        self.head: list[tuple[str, str]] = []
        self.pieces: list[bytes] = []
        self.trailers: list[tuple[str, str]] = []
        self.reset = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        with sock, contextlib.suppress(OSError):
            sock.sendall(connection.data_to_send())
            while data := sock.recv(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.StreamEnded):
                        self._answer(connection, event.stream_id)
                sock.sendall(connection.data_to_send())

    def _answer(self, connection: h2.connection.H2Connection, stream: int) -> None:
        bare = not self.pieces and not self.trailers and not self.reset
        connection.send_headers(stream, self.head, end_stream=bare)
        for number, piece in enumerate(self.pieces):
            last = number == len(self.pieces) - 1 and not self.trailers and not self.reset
            connection.send_data(stream, piece, end_stream=last)
        if self.reset:
            connection.reset_stream(stream)
        elif self.trailers:
            connection.send_headers(stream, self.trailers, end_stream=True)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OddService, Web]]:
    folder = tmp_path_factory.mktemp("odd")
    service = OddService()
    (folder / "edge.yaml").write_text(configuration("protocol: grpc", service.port))
    with contextlib.closing(service), WatchedGateway(folder / "edge.yaml") as gateway:
        yield service, Web(gateway, GrpcBank.__new__(GrpcBank))


GRPC = [(":status", "200"), ("content-type", "application/grpc")]


def say(service: OddService, head: list[tuple[str, str]], pieces: list[bytes], end: list[tuple[str, str]], *, reset: bool = False) -> None:
    service.head, service.pieces, service.trailers, service.reset = head, pieces, end, reset


@both
@pytest.mark.parametrize("status", ["200", "503"])
def test_an_answer_that_is_no_grpc_passes_as_it_is(odd: tuple[OddService, Web], http2: bool, status: str) -> None:
    service, web = odd
    say(service, [(":status", status), ("content-type", "text/html")], [b"<h1>", b"sorry"], [])
    answer = web.call("Transfer", message(b"1"), http2=http2)
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (int(status), "text/html", b"<h1>sorry")


@both
def test_an_answer_in_its_head_alone(odd: tuple[OddService, Web], http2: bool) -> None:
    service, web = odd
    say(service, [*GRPC, ("grpc-status", "5"), ("grpc-message", "none")], [], [])
    answer = web.call("Transfer", message(b"1"), http2=http2)
    assert (answer.status_code, answer.content, answer.headers["grpc-status"]) == (200, b"", "5")
    assert answer.headers["content-type"] == "application/grpc-web+proto"


@both
def test_an_answer_with_a_length(odd: tuple[OddService, Web], http2: bool) -> None:
    service, web = odd
    body = message(b"one")
    say(service, [*GRPC, ("content-length", str(len(body)))], [body], [("grpc-status", "0")])
    first, last = frames(web.call("Transfer", message(b"1"), http2=http2).content)
    assert first == (0, b"one") and trailers(last) == {"grpc-status": "0"}


@both
@pytest.mark.parametrize("pieces", [[message(b"one")], [message(b"one")[:3], message(b"one")[3:]], []])
def test_an_answer_without_a_status_is_an_error(odd: tuple[OddService, Web], http2: bool, pieces: list[bytes]) -> None:
    service, web = odd
    say(service, GRPC, pieces, [("x-other", "1")] if pieces else [])
    found = frames(web.call("Transfer", message(b"1"), http2=http2).content)
    assert found[:-1] == ([(0, b"one")] if pieces else [])
    assert trailers(found[-1])["grpc-status"] == "13"


@both
@pytest.mark.parametrize("kind", [BINARY, TEXT])
@pytest.mark.parametrize(
    ("pieces", "reset"),
    [([message(b"one"), message(b"grpc-status: 0", 0x80)], False), ([message(b"one")[:-1]], False), ([message(b"one")[:-1]], True)],
    ids=["trailers in a message", "a message cut short", "a reset in a message"],
)
def test_an_answer_that_breaks_is_cut_and_never_ended(
    odd: tuple[OddService, Web], http2: bool, kind: str, pieces: list[bytes], reset: bool
) -> None:
    service, web = odd
    say(service, GRPC, pieces, [] if reset else [("grpc-status", "0")], reset=reset)
    body = message(b"1")
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        web.call("Transfer", body if kind == BINARY else base64.b64encode(body), kind, http2=http2)
    say(service, GRPC, [message(b"ok")], [("grpc-status", "0")])
    assert frames(web.call("Transfer", message(b"1"), http2=http2).content)[0] == (0, b"ok")


@both
@pytest.mark.parametrize("kind", [BINARY, TEXT])
def test_an_answer_that_stops_between_two_messages_says_so(odd: tuple[OddService, Web], http2: bool, kind: str) -> None:
    service, web = odd
    say(service, GRPC, [message(b"one")], [], reset=True)
    body = message(b"1")
    answer = web.call("Transfer", body if kind == BINARY else base64.b64encode(body), kind, http2=http2)
    first, last = frames(answer.content if kind == BINARY else decoded(answer.content))
    assert first == (0, b"one") and trailers(last)["grpc-status"] == "14"


@both
def test_a_deadline_in_the_middle_of_a_stream_is_told(web: Web, http2: bool) -> None:
    """The service sends one message and waits; the client allows three seconds."""
    first, last = frames(web.call("Watch", message(b"3"), http2=http2, grpc_timeout="3S").content)
    assert first == (0, b"0") and trailers(last)["grpc-status"] == "4"
