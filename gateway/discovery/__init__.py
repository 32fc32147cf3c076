"""Where the endpoints of upstreams are, and where they have gone since.

Strategy: runs on the loop of whoever needs it (workers, the checker, a sidecar) and never blocks it; what was once found is given up
only for something better. Importing the package imports none of its modules: a sidecar uses the look-ups without the schema.
"""
