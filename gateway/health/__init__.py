"""Asking endpoints whether they are well: what is sent and what is taken for a yes, and when.

Strategy: a probe says why an endpoint is not well, or nothing; how many such answers make a verdict is counted in the table that
all processes share. Runs in one process of a machine, on its loop. Importing the package imports nothing: a sidecar uses the gRPC question alone.
"""
