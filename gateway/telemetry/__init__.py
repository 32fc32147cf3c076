"""Metrics of all workers: shared memory, percentiles and the Prometheus collector."""
