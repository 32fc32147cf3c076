"""What Python policies build their answers from: deny() and respond() accept what can be sent, and refuse what could not."""

from __future__ import annotations

import asyncio

import pytest

import gateway
from gateway import InvalidBody, Policy, deny, respond
from gateway._speedups import hooks
from gateway._speedups.hooks import HookStep


def test_the_package_offers_what_policies_import() -> None:
    for name in gateway.__all__:
        assert getattr(gateway, name) is not None
    with pytest.raises(AttributeError):
        gateway.nothing  # noqa: B018


def test_a_refusal() -> None:
    reply = deny(403, "amount-above-ceiling", "too much", headers={"X-Why": 1})
    assert (reply.status, reply.slug, reply.detail, reply.headers) == (403, b"amount-above-ceiling", b"too much", b"x-why: 1\r\n")
    assert reply == deny(403, "amount-above-ceiling")
    assert reply != deny(409, "amount-above-ceiling")
    assert repr(reply) == "<Reply 403 amount-above-ceiling>"
    assert deny(403, "x").detail == b"refused by a policy"


@pytest.mark.parametrize("text", ['"', "\\", "\r\nSet-Cookie: a=b", "\0", "\x7f", "ä", "\u2028", "\ud800"])
def test_a_detail_cannot_break_json_nor_a_header(text: str) -> None:
    detail = deny(403, "x", f"a{text}b").detail
    assert detail.startswith(b"a?") and detail.endswith(b"b")
    assert all(32 <= byte < 127 and byte not in b'"\\' for byte in detail)


def test_a_detail_is_cut() -> None:
    assert len(deny(403, "x", "d" * 100_000).detail) == 512


@pytest.mark.parametrize("reason", ["", "two words", 'quo"te', "line\r\nend", "ü", "a/b"])
def test_a_reason_is_a_slug(reason: str) -> None:
    with pytest.raises(ValueError, match="slug"):
        deny(403, reason)


@pytest.mark.parametrize("status", [0, 99, 100, 101, 199, 600, 1000, -1])
def test_only_a_final_status_is_sent(status: int) -> None:
    with pytest.raises(ValueError):
        deny(status, "x")
    with pytest.raises(ValueError):
        respond(status)


def test_a_refusal_refuses() -> None:
    with pytest.raises(ValueError, match=r"use respond\(\)"):
        deny(200, "x")


def test_an_answer() -> None:
    reply = respond(201, "é", headers={"X-A": "b"})
    assert (reply.status, reply.body, reply.headers) == (201, "é".encode(), b"x-a: b\r\n")
    assert reply.content_type == b"text/plain; charset=utf-8"
    assert respond(body=b"\0\xff").body == b"\0\xff"
    assert respond(200, b"{}", headers={"Content-Type": "application/json"}).content_type == b"application/json"
    assert respond(200, b"{}", headers={"Content-Type": "application/json"}).headers is None
    assert respond(200, b"{}", content_type="application/json").content_type == b"application/json"


def test_an_answer_has_a_limit_and_a_body_of_bytes() -> None:
    assert len(respond(200, b"x" * hooks.BODY_MAX).body) == hooks.BODY_MAX
    with pytest.raises(ValueError, match="at most"):
        respond(200, b"x" * (hooks.BODY_MAX + 1))
    for body in (10_000_000_000, {"a": 1}, None, [1]):     # bytes(10_000_000_000) would be ten gigabytes
        with pytest.raises(TypeError):
            respond(200, body)


@pytest.mark.parametrize("name", [
    "", "a b", "a:b", "a\r\nb", "ä", "a\0", "Content-Length", "transfer-encoding", "Connection", "content_length", "Transfer.Encoding", "Host", "TE",
])
def test_a_header_name_is_a_token_and_not_the_gateways(name: str) -> None:
    for make in (lambda: deny(403, "x", headers={name: "v"}), lambda: respond(200, headers={name: "v"})):
        with pytest.raises(ValueError):
            make()


@pytest.mark.parametrize("value", ["a\r\nb", "a\nb", "a\0", "\x7f", "a\rb"])
def test_a_header_value_has_no_control_characters(value: str) -> None:
    with pytest.raises(ValueError):
        respond(200, headers={"x-a": value})
    with pytest.raises(ValueError):
        respond(200, content_type=value)


def test_outer_space_of_a_value_is_dropped_and_a_tab_kept() -> None:
    assert respond(200, headers={"x-a": " a\tb "}).headers == b"x-a: a\tb\r\n"


def test_a_step_knows_the_phases_of_its_policy() -> None:
    class Nothing(Policy):
        pass

    class All(Policy):
        body_limit = 10

        def on_request(self, request: object) -> None: ...
        def on_response(self, request: object, response: object) -> None: ...
        def on_end(self, request: object, response: object) -> None: ...

    step, full = HookStep("a", Nothing()), HookStep("b", All(), timeout=2.5)
    assert (step.sees_response, step.sees_end, step.body_limit, step.timeout) == (False, False, 0, 1.0)
    assert (full.sees_response, full.sees_end, full.body_limit, full.timeout) == (True, True, 10, 2.5)
    assert issubclass(InvalidBody, ValueError)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_what_would_end_the_worker_becomes_an_error(error: type[BaseException]) -> None:
    async def policy() -> None:
        raise error

    async def call() -> None:
        await asyncio.create_task(hooks.guarded(policy()))

    with pytest.raises(hooks.Stopped):
        asyncio.run(call())


def test_the_gateways_own_cancellation_stays_one() -> None:
    async def call() -> bool:
        task = asyncio.create_task(hooks.guarded(asyncio.sleep(60)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(call())


def test_settling_waits_for_ends_but_not_forever() -> None:
    async def call() -> tuple[bool, bool]:
        quick, slow = asyncio.create_task(asyncio.sleep(0.01)), asyncio.create_task(asyncio.sleep(60))
        hooks.ending.update((quick, slow))
        await hooks.settle(0.2)
        slow.cancel()
        hooks.ending.clear()
        await hooks.settle(60)
        return quick.done(), slow.done()

    assert asyncio.run(call()) == (True, False)
