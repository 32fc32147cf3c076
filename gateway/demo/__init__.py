"""A small bank from its edge to its ledger, and the steps that show what an edge and a mesh do for it.

Strategy: everything is real and local. `services` are the bank's own, `stage` writes the configurations and starts all of it as
anybody would; `story` (requests to the edge), `journey` (one payment through every hop) and `chapters` (denial, death, renewal) do
things to it and say what each must come to. Nothing here is imported by the gateway itself; `show` and `gateway.cli.demo` print it.
"""
