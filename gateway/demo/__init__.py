"""A small bank, a gateway in front of it, and the requests that show what the gateway does.

Strategy: everything is real and local. `bank` runs the services and the token issuer in one process of their own, `stage`
writes a configuration and starts the gateway on it as anybody would, `story` sends requests over plain sockets and says what
each must do. Nothing here is imported by the gateway itself; `gateway.cli.demo` shows the result.
"""
