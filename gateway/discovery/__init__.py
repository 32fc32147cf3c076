"""Where the endpoints of upstreams are, and where they have gone since.

Strategy: runs on the loop of whoever needs it (workers, the checker) and never blocks it; what was once found is given up
only for something better.
"""

from gateway.discovery.book import book_of, counts
from gateway.discovery.found import Found
from gateway.discovery.source import Discovery

__all__ = ["Discovery", "Found", "book_of", "counts"]
