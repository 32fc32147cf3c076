"""The requests that show the edge, in order, and what each must do.

Strategy: a step sends one request (or a burst), compares the status, reads its evidence from the answer, and looks into the services' logs
how many requests they saw meanwhile: an accepted request must have arrived, a refused one must not. What fails is named; nothing
stops the story, so that all of it is seen.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from gateway.demo.caller import Answer, Call
from gateway.demo.files import BURST, CEILING, RATE
from gateway.demo.stage import Stage

OVERSIZED = 2 << 20  # bytes; the configuration allows 1 MiB
Evidence = Callable[[Answer], str]


class Unmet(Exception):
    """The answer lacks something that it must have; the message names it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One step as it went. `problem` is empty when it did what it should; latency is in seconds."""

    title: str
    sent: str
    status: str
    reason: str
    seconds: float
    reached: int
    problem: str

    @property
    def good(self) -> bool:
        """Tell whether the step did what it should."""
        return not self.problem


def require(present: object, missing: str) -> None:
    """Raise Unmet naming what is missing unless it is present."""
    if not present:
        raise Unmet(missing)


def booked(answer: Answer) -> str:
    """Return what the bank did with the payment."""
    payment = answer.json()
    require(payment.get("status") == "booked", "the payment is not booked")
    return f"{payment['id']}, entry {payment['entry']} ({payment['ledger']})"


def refusal(answer: Answer) -> str:
    """Return the reason of a refusal, which must be problem details with a request id (RFC 9457)."""
    require("problem+json" in answer.headers.get("content-type", ""), "the answer is not problem+json")
    problem = answer.json()
    require(problem.get("status") == answer.status, "the problem details name another status")
    require(problem.get("request_id"), "the problem details have no request_id")
    return answer.reason()


def challenged(answer: Answer) -> str:
    """Return the reason of a 401, which must carry a challenge (RFC 6750 section 3)."""
    require(answer.headers.get("www-authenticate", "").startswith("Bearer"), "no WWW-Authenticate: Bearer")
    return refusal(answer)


def allowing(answer: Answer) -> str:
    """Return the reason of a 405, which must say what is allowed (RFC 9110 section 15.5.6)."""
    require("POST" in answer.headers.get("allow", ""), "no Allow: POST")
    return refusal(answer)


def closing(answer: Answer) -> str:
    """Return the reason of a 400 after which nothing more may be read from the connection."""
    require(answer.headers.get("connection", "").lower() == "close", "no Connection: close")
    return refusal(answer)


def _encoded(value: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


class Story:
    """Plays the demo against a stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._caller = stage.caller()
        self._clerk = stage.token("clerk", ["payments:write", "payments:read"])

    def play(self) -> Iterator[Outcome]:
        """Yield the outcome of each step as it ends."""
        try:
            yield from self._accepted()
            yield from self._bad_tokens()
            yield from self._not_allowed()
            yield from self._bad_requests()
            yield self._burst()
        finally:
            self._caller.close()

    # --- chapters ---

    def _accepted(self) -> Iterator[Outcome]:
        location = ""

        def made(answer: Answer) -> str:
            nonlocal location
            location = answer.headers.get("location", "")
            return booked(answer)

        yield self._step("payment, RS256 token", 201, self._payment(250, self._clerk), made)
        mobile = self._stage.token("mobile", ["payments:write"], "ES256")
        yield self._step("payment, ES256 token", 201, self._payment(80, mobile), booked)
        yield self._step("read it back", 200, Call("GET", location or "/v1/payments/p-1", self._clerk), booked)
        yield self._step(
            "public page, no token",
            200,
            Call("GET", "/public/rates"),
            lambda answer: f"EUR/USD {answer.json()['EUR/USD']}",
        )

    def _bad_tokens(self) -> Iterator[Outcome]:
        yield self._step("no token", 401, self._payment(250, None), challenged)
        yield self._step("forged token", 401, self._payment(250, self._forged()), challenged)
        yield self._step("unsigned token (alg none)", 401, self._payment(250, self._unsigned()), challenged)
        expired = self._stage.token("clerk", ["payments:write"], lifetime=-600)
        yield self._step("expired token", 401, self._payment(250, expired), challenged)

    def _not_allowed(self) -> Iterator[Outcome]:
        reader = self._stage.token("auditor", ["payments:read"])
        yield self._step("missing scope", 403, self._payment(250, reader), refusal)
        yield self._step("Python policy refuses", 403, self._payment(CEILING * 9, self._clerk), refusal)
        director = self._stage.token("director", ["payments:write", "payments:high"])
        yield self._step("Python policy agrees", 201, self._payment(CEILING * 9, director), booked)

    def _bad_requests(self) -> Iterator[Outcome]:
        large = Call("POST", "/v1/payments", self._clerk, body=b"{" + b" " * 16384, declared=OVERSIZED)
        yield self._step("oversized body", 413, large, refusal)
        yield self._step("unknown path", 404, Call("GET", "/v2/payments", self._clerk), refusal)
        yield self._step("wrong method", 405, Call("DELETE", "/v1/payments", self._clerk), allowing)
        smuggled = (
            b"POST /public/rates HTTP/1.1\r\nHost: api.bank.test\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n\r\nGET /v1/accounts HTTP/1.1\r\nHost: api.bank.test\r\n\r\n"
        )
        yield self._step("request smuggling", 400, Call("POST", "/public/rates", raw=smuggled), closing)

    def _burst(self) -> Outcome:
        """Send twice the burst at once: the bucket's worth passes, the rest is told when to come back."""
        call = Call("GET", "/v1/accounts", self._stage.token("batch", []))
        before, started = self._stage.reached(), time.perf_counter()
        answers: list[Answer] = []
        problem = ""
        try:
            answers = [self._caller.call(call) for _ in range(BURST * 2)]
        except (OSError, http.client.HTTPException) as error:
            problem = f"no answer: {error or type(error).__name__}"
        elapsed = time.perf_counter() - started
        reached = self._stage.reached() - before
        passed = sum(answer.status == 200 for answer in answers)
        limited = [answer for answer in answers if answer.status == 429]
        reason = ""
        if not problem:
            try:
                require(passed + len(limited) == len(answers), "an answer is neither 200 nor 429")
                require(BURST <= passed <= BURST + RATE * elapsed + 1, f"{passed} passed, the bucket holds {BURST}")
                require(passed == reached, f"{passed} passed, but {reached} reached the bank")
                require(limited and all("retry-after" in each.headers for each in limited), "a 429 without Retry-After")
                refusal(limited[0])
                reason = f"{passed} passed, {len(limited)} are told: Retry-After {limited[0].headers['retry-after']} s"
            except (Unmet, ValueError) as unmet:
                problem = str(unmet)
        status = "/".join(str(status) for status in sorted({answer.status for answer in answers})) or "-"
        middle = sorted(answer.seconds for answer in answers)[len(answers) // 2] if answers else 0.0
        return Outcome(
            "burst over the limit", f"{len(answers)} x GET {call.path}", status, reason, middle, reached, problem
        )

    # --- one step ---

    def _step(self, title: str, expected: int, call: Call, evidence: Evidence) -> Outcome:
        sent, before = f"{call.method} {call.path}", self._stage.reached()
        try:
            answer = self._caller.call(call)
        except (OSError, http.client.HTTPException) as error:
            return Outcome(title, sent, "-", "", 0.0, 0, f"no answer: {error or type(error).__name__}")
        reached = self._stage.reached() - before
        reason, problem = "", ""
        if answer.status != expected:
            reason, problem = answer.reason(), f"expected {expected}"
        else:
            try:
                reason = evidence(answer)
                require(reached == (expected < 400), f"{reached} requests reached the bank")
            except (Unmet, ValueError, KeyError) as unmet:
                problem = str(unmet)
        return Outcome(title, sent, str(answer.status), reason, answer.seconds, reached, problem)

    @staticmethod
    def _payment(amount: int, token: str | None) -> Call:
        order = {"creditor": "DE02500105170137075030", "amount": str(amount), "currency": "EUR"}
        return Call("POST", "/v1/payments", token, body=json.dumps(order).encode())

    def _forged(self) -> str:
        """Return the clerk's token as a thief would sign it: the same claims and key id, another key."""
        claims = jwt.decode(self._clerk, options={"verify_signature": False})
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        return jwt.encode(claims, key, "RS256", headers=jwt.get_unverified_header(self._clerk))

    def _unsigned(self) -> str:
        claims = jwt.decode(self._clerk, options={"verify_signature": False})
        return f"{_encoded({'alg': 'none', 'typ': 'at+jwt'})}.{_encoded(claims)}."
