"""How often something is done: a bucket of tokens, and one for each address, bounded in number.

Strategy: arithmetic at the moment of asking, no timers; the clock is given, so tests have their own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from gateway.config.values import Rate

ADDRESSES = 4096  # that are told apart; the one unheard of for longest is forgotten first


class Bucket:
    """At most `count` at once, and `count` in each period afterwards."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._left, self._at = float(rate.count), clock()

    def take(self) -> bool:
        now = self._clock()
        self._left = min(float(self.rate.count), self._left + (now - self._at) * self.rate.count / self.rate.period)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Buckets:
    """A bucket for each address."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._kept: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, address: str) -> bool:
        bucket = self._kept.pop(address, None) or Bucket(self._rate, self._clock)
        self._kept[address] = bucket
        if len(self._kept) > ADDRESSES:
            self._kept.popitem(last=False)
        return bucket.take()
