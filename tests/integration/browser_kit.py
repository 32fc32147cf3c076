"""Chromium, where it is installed: 300 MB that script/setup does not fetch.

Strategy: one list of switches that make it silent and reproducible; what a browser does is shown by the pages that the tests serve.
"""

from __future__ import annotations

import shutil

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), "")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", "--disable-background-networking"]

needs_chromium = pytest.mark.skipif(
    not CHROMIUM,
    reason="Chromium is not installed, and at 300 MB script/setup does not fetch it (Debian: apt-get install chromium); the same requests are made by"
    " the clients curl, httpx, h2 and websockets in the files beside this one",
)
