"""Answers of HTTP/2 upstreams to clients of HTTP/1.1, behind policies that see them or translate them: the framing stays sound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.faults import connect, get
from tests.integration.h2_kit import connect_h2, head
from tests.integration.h2_origin import Call, TwinOrigin

POLICY = """
from gateway import Policy


class Sees(Policy):
    def on_response(self, request, response):
        response.set_header("x-seen", response.status)
"""
CONFIG = """
version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
listeners: {{public: {{bind: 127.0.0.1:0, http2: {{clear: true}}}}}}
upstreams: {{bank: {{targets: [127.0.0.1:{port}], protocol: {protocol}}}}}
policies:
  sees: {{python: {{class: "rules:Sees"}}}}
  web: {{grpc_web: {{request: 64KiB}}}}
routes:
  - {{name: seen, match: {{prefix: /seen}}, policies: [sees], upstream: bank}}
  - {{name: twice, match: {{prefix: /twice}}, policies: [sees, {{python: {{class: "rules:Sees"}}}}], upstream: bank}}
  - {{name: web, match: {{prefix: /web}}, policies: [web], upstream: bank}}
"""
WEB = "application/grpc-web+proto"


@pytest.fixture(scope="module")
def origin() -> Iterator[TwinOrigin]:
    with TwinOrigin() as made:
        yield made


@pytest.fixture(scope="module", params=["http2", "grpc"])
def gateway(request: pytest.FixtureRequest, origin: TwinOrigin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedGateway]:
    folder = tmp_path_factory.mktemp("translated")
    (folder / "rules.py").write_text(POLICY)
    (folder / "edge.yaml").write_text(CONFIG.format(port=origin.two, protocol=request.param))
    with WatchedGateway(folder / "edge.yaml") as running:
        yield running


@pytest.fixture(autouse=True)
def calm(origin: TwinOrigin, gateway: WatchedGateway) -> Iterator[None]:
    yield
    origin.reset()
    gateway.calm()


async def bare(call: Call) -> None:
    """A head that ends the stream, without a length."""
    await call.body()
    await call.head(200 if call.path.startswith("/web") else 201, [("content-type", "application/grpc+proto")], end=True)


@pytest.mark.parametrize("path", ["/seen", "/twice"])
def test_an_answer_that_ends_with_its_head_says_so_behind_a_policy(gateway: WatchedGateway, origin: TwinOrigin, path: str) -> None:
    origin.script = bare
    with connect(gateway.port()) as client:
        for _ in range(2):                          # the second request shows that both sides agree where the first answer ended
            answer = client.ask(get(path))
            assert (answer.status, answer.fields["content-length"], answer.body) == (201, "0", b"")
            assert answer.fields["x-seen"].startswith("201")


@pytest.mark.parametrize("path", ["/seen", "/twice"])
def test_an_answer_with_a_body_without_a_length_behind_a_policy(gateway: WatchedGateway, origin: TwinOrigin, path: str) -> None:
    async def script(call: Call) -> None:
        await call.body()
        await call.head(201)
        await call.write(b"booked")
        await call.finish()

    origin.script = script
    with connect(gateway.port()) as client:
        for _ in range(2):
            answer = client.ask(get(path))
            assert (answer.status, answer.body, answer.fields.get("transfer-encoding")) == (201, b"booked", "chunked")


def test_the_answer_to_a_head_request_has_no_body_though_it_is_translated(gateway: WatchedGateway, origin: TwinOrigin) -> None:
    """Bytes behind it would be taken for the next answer (RFC 9112 6.3)."""
    origin.script = bare
    with connect(gateway.port()) as client:
        client.send(get("/web/Pay", f"content-type: {WEB}", method="HEAD"))
        answer = client.answer("HEAD")
        assert (answer.status, answer.fields["content-type"]) == (200, WEB)
        client.send(get("/seen/after", "connection: close"))
        received, ended = client.rest()
        assert received.startswith(b"HTTP/1.1 201 ") and ended
    with connect_h2(gateway.port()) as client2:
        answer2 = client2.ask(head("/web/Pay", "HEAD", ("content-type", WEB)))
        assert (answer2.status, answer2.body, answer2.ended) == (200, b"", True)
