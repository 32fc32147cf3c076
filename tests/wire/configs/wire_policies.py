"""Python policies for the transcripts in hook/."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway import Policy, Request, deny


class Reads(Policy):
    """Ask for the body and name its length to the upstream."""

    body_limit = 1024

    def on_request(self, request: Request) -> None:
        request.set_header("X-Body-Length", len(request.body))


class Names(Policy):
    """Say who calls, in a header that only the gateway may set."""

    def on_request(self, request: Request) -> None:
        request.set_header("X-User", "gateway")


class Checks(Policy):
    """See the answer: refuse it when it says so, change it otherwise; `later` waits for the loop's next turn first."""

    async def on_response(self, request: Request, response: Any) -> Any:
        if request.path.endswith("later"):
            await asyncio.sleep(0)
        if "x-refuse" in response.headers:
            return deny(502, "answer-refused", "the answer is not fit to be seen")
        response.set_header("X-Checked", "yes")
        return None
