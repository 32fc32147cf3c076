"""The files that the demo writes: a configuration like a bank's edge, and a policy beside it.

Strategy: text, not modules, because that is what they are to the gateway: it reads them from the folder of the configuration.
"""

CEILING = 1000
RATE = 5  # requests per second and client
BURST = 20

CONFIGURATION = """\
# Made by `crossway demo`. Try: crossway check -c {file}
version: 1
workers: auto

admin: {{bind: "127.0.0.1:{admin}"}}

listeners:
  public:
    bind: "127.0.0.1:{public}"
    timeouts: {{head: 10s, body: 30s, keepalive: 75s}}
    limits: {{head: 32KiB, fields: 100, target: 8KiB, body: 1MiB}}

upstreams:
  payments:
    targets: ["127.0.0.1:{ports[payments]}"]
    timeouts: {{connect: 2s, head: 15s, idle: 30s, total: 60s}}
  accounts:
    targets:
      - "127.0.0.1:{ports[accounts-1]}"
      - {{address: "127.0.0.1:{ports[accounts-2]}", weight: 2}}

policies:
  bank-token:
    jwt:
      issuer: {issuer}
      audience: {audience}
      keys: http://127.0.0.1:{ports[auth]}/.well-known/jwks.json
      algorithms: [RS256, ES256]
  per-client:
    rate_limit: {{key: client, rate: {rate}/s, burst: {burst}}}
  ceiling:
    python: {{class: "policy:HighValue", ceiling: {ceiling}}}       # policy.py, beside this file
  trail:
    audit: {{file: audit.jsonl}}

routes:
  - name: create-payment
    match: {{path: /v1/payments, methods: [POST]}}
    policies: [bank-token, {{scopes: [payments:write]}}, per-client, ceiling, trail]
    upstream: payments
  - name: read-payment
    match: {{path: "/v1/payments/{{id}}", methods: [GET]}}
    policies: [bank-token, {{scopes: [payments:read]}}, trail]
    upstream: payments
  - name: accounts
    match: {{prefix: /v1/accounts}}
    policies: [bank-token, per-client]
    upstream: accounts
  - name: public
    match: {{prefix: /public}}
    upstream: accounts
"""

POLICY = '''\
"""A policy in Python, as a bank would write one."""

from gateway import Policy, Request, deny


class HighValue(Policy):
    """Refuse payments above a ceiling unless the token carries the scope payments:high."""

    body_limit = 64 * 1024                      # asks for the body, at most this much

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling

    async def on_request(self, request: Request):
        payment = request.json()
        if float(payment["amount"]) > self.ceiling and "payments:high" not in request.principal.scopes:
            return deny(403, "amount-above-ceiling", f"payments above {self.ceiling} need payments:high")
        return None                             # go on
'''
