"""The files that the demo writes: an edge's configuration, a mesh's, and a policy in Python beside them.

Strategy: text, not modules, because that is what they are to the programs: they read them from the folder of the configuration.
"""

CEILING = 1000
RATE = 5  # requests per second and client, of accounts
BURST = 20

EDGE = """\
# Made by `crossway demo`. Try: crossway check -c {folder}/edge.yaml
version: 1
workers: 2

admin: {{bind: "127.0.0.1:{admin}"}}

mesh: {{service: edge, control: "https://127.0.0.1:{control}", token: edge.token, state: edge.state}}

listeners:
  public:
    bind: "127.0.0.1:{public}"
    timeouts: {{head: 10s, body: 30s, keepalive: 75s}}
    limits: {{head: 32KiB, fields: 100, target: 8KiB, body: 1MiB}}

upstreams:                              # members of the mesh: found by name, proven by certificate
  payments:
    service: payments
    timeouts: {{connect: 2s, head: 20s, idle: 30s, total: 60s}}
  accounts: {{service: accounts}}

policies:
  bank-token:
    jwt:
      issuer: {issuer}
      audience: {audience}
      keys: http://127.0.0.1:{auth}/.well-known/jwks.json
      algorithms: [RS256, ES256]
  till:
    rate_limit: {{key: client, rate: 500/s, burst: 500}}
  per-client:
    rate_limit: {{key: client, rate: {rate}/s, burst: {burst}}}
  ceiling:
    python: {{class: "policy:HighValue", ceiling: {ceiling}}}       # policy.py, beside this file
  trail:
    audit: {{file: audit.jsonl}}

routes:
  - name: create-payment
    match: {{path: /v1/payments, methods: [POST]}}
    policies: [bank-token, {{scopes: [payments:write]}}, till, ceiling, trail]
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

MESH = """\
# Made by `crossway demo`. Try: crossway mesh status -c {folder}/mesh.yaml
version: 1
trust_domain: bank.test

control:
  bind: "127.0.0.1:{control}"
  admin: "127.0.0.1:{control_admin}"
  state: mesh.db
  ca: ca
  heartbeat: 8s

certificates: {{lifetime: {lifetime}}}

services:
  edge: {{}}
  payments: {{timeout: 20s}}
  accounts: {{timeout: 20s}}
  ledger:
    timeout: 10s
    retries: {{attempts: 2, on: [connect-failure, reset, 502, 503], idempotency_key: true}}

authorization:
  default: deny
  rules:
    - {{name: edge-makes-payments, from: [edge], to: payments, methods: [POST], prefix: /v1/payments, claims: {{scope: "payments:write"}}}}
    - {{name: edge-reads-payments, from: [edge], to: payments, methods: [GET], prefix: /v1/payments}}
    - {{name: edge-to-accounts, from: [edge], to: accounts, methods: [GET]}}
    - {{name: payments-writes-entries, from: [payments], to: ledger, methods: [POST], prefix: /entries}}
    - {{name: accounts-reads-balance, from: [accounts], to: ledger, methods: [GET], prefix: /balance}}
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
