"""The messages that the micro benchmarks parse and write: small, as a browser sends it, and large.

Strategy: bytes as they stand on the wire, the same for every parser that is compared.
"""


def _head(start: str, *lines: str) -> bytes:
    return "\r\n".join((start, *lines, "", "")).encode()


SMALL = _head("GET /v1/payments/42 HTTP/1.1", "Host: api.bank.test", "Accept: */*")

BROWSER = _head(
    "GET /v1/accounts/DE02120300000000202051/transactions?from=2026-01-01&to=2026-01-31&page=2 HTTP/1.1",
    "Host: api.bank.test",
    "Connection: keep-alive",
    'sec-ch-ua: "Chromium";v="140", "Not=A?Brand";v="24", "Google Chrome";v="140"',
    "sec-ch-ua-mobile: ?0",
    'sec-ch-ua-platform: "Windows"',
    "User-Agent: Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
    "Accept: application/json, text/plain, */*",
    "Origin: https://online.bank.test",
    "Sec-Fetch-Site: same-site",
    "Sec-Fetch-Mode: cors",
    "Sec-Fetch-Dest: empty",
    "Referer: https://online.bank.test/accounts/current/transactions",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Accept-Language: de-DE,de;q=0.9,en-GB;q=0.8,en;q=0.7",
    "Cookie: session=0192f3a47c1e7b539d104f6a2c8e1b07; theme=dark; consent=essential; region=DE-BE",
)

SIXTY = _head(
    "POST /v1/payments HTTP/1.1",
    "Host: api.bank.test",
    "Content-Type: application/json",
    "Content-Length: 112",
    *(f"X-Field-{i:02}: value {i} of a header that some gateway on the way has added" for i in range(57)),
)

ANSWER = _head(
    "HTTP/1.1 200 OK", "Server: origin", "Date: Thu, 01 Jan 2026 00:00:00 GMT", "Content-Type: application/json",
    "Content-Length: 119", "Connection: keep-alive",
)  # fmt: skip

REQUESTS = {"small": SMALL, "browser": BROWSER, "60 fields": SIXTY}
