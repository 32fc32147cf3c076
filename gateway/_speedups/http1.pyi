"""Strict HTTP/1.1 parsing: for other native modules only; Python sees it through gateway._speedups.testing."""
