"""Measuring HTTP services: one run, two runs compared, a sweep over worker counts.

Strategy: `settings` says what to send, `runner` drives the compiled load generator and turns it into one JSON document, and
everything else (tables, files, comparisons, sweeps) reads only that document, so that a saved run is as good as a fresh one.
"""
