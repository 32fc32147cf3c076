"""`redis:` and the limits that need it: what is refused, what is doubted, and that nothing is loaded of it unless it is there."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.config import load
from gateway.config.redis import parse_redis_url
from gateway.errors import Problem
from tests.unit.test_config_findings import HEAD, ROOT, found, only, route, write

CLUSTER = "{rate_limit: {key: ip, rate: 5/s, scope: cluster}}"
QUOTA = "{quota: {key: ip, limit: 5, per: day}}"
LOCAL = "{rate_limit: {key: ip, rate: 5/s}}"


def problems(folder: Path, policy: str, redis: str | None) -> list[Problem]:
    head = HEAD + (f"redis: {redis}\n" if redis is not None else "") + "routes:\n"
    return found(write(folder, route("r", "prefix: /", policy), head))


@pytest.mark.parametrize("policy", [CLUSTER, QUOTA])
def test_a_limit_over_gateways_needs_redis(tmp_path: Path, policy: str) -> None:
    only(problems(tmp_path, policy, None), "error", "but no Redis to keep it in", "add `redis:")
    assert problems(tmp_path, policy, "{url: redis://127.0.0.1}") == []


def test_a_redis_that_nothing_uses_is_doubted(tmp_path: Path) -> None:
    only(problems(tmp_path, LOCAL, "{url: redis://127.0.0.1}"), "warning", "no policy uses Redis")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("{rate_limit: {key: ip, rate: 5/s, exact: true}}", "`exact` is about Redis"),
        ("{rate_limit: {key: ip, rate: 5/s, on_failure: deny}}", "`on_failure` is about Redis"),
        ("{rate_limit: {key: ip, rate: 5/s, scope: galaxy}}", "expected one of machine, cluster"),
        ("{rate_limit: {key: ip, rate: 5/s, scope: cluster, on_failure: hope}}", "expected one of local, deny, allow"),
        ("{rate_limit: {key: ip, rate: 1/30d, burst: 1000000, scope: cluster}}", "17 years"),
        ("{rate_limit: {key: ip, rate: 999983/30d, burst: 1000000000, scope: cluster}}", "more than 17 years"),
        ("{rate_limit: {key: ip, rate: 16381/s, burst: 1000000000, scope: cluster}}", ""),
        ("{quota: {key: ip, limit: 5}}", "missing key 'per'"),
        ("{quota: {key: ip, limit: 0, per: day}}", "must be at least 1"),
        ("{quota: {key: ip, limit: 5, per: week}}", "expected one of hour, day, month"),
        ("{quota: {key: client, limit: 5, per: day}}", "a quota by client without a policy that says who calls"),
    ],
)
def test_settings_of_limits_that_are_refused(tmp_path: Path, policy: str, message: str) -> None:
    said = [problem.message for problem in problems(tmp_path, policy, "{url: redis://127.0.0.1}")]
    assert said == [] if not message else any(message in one for one in said), said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{}", "missing key 'url'"),
        ("{url: http://127.0.0.1}", "not the URL of a Redis server"),
        ("{url: 'redis://:secret-word@127.0.0.1'}", "a user or password in the URL would be shown"),
        ("{url: 'redis://127.0.0.1:port'}", "not a URL"),
        ("{url: 'redis://127.0.0.1:0'}", "not the address of a server"),
        ("{url: 'redis://127.0.0.1:6379/first'}", "the database is a number"),
        ("{url: 'redis://127.0.0.1?db=1'}", "nothing behind the database"),
        ("{url: 'redis://'}", "the URL needs a host"),
        ("{url: 'redis://a b'}", "expected the URL"),
        ("{url: 'unix://run/redis.sock'}", "a Unix socket needs an absolute path"),
        ("{url: 'unix:///run/redis.sock', cluster: true}", "a cluster cannot be reached through a Unix socket"),
        ("{url: 'redis://127.0.0.1/1', cluster: true}", "a cluster has database 0 only"),
        ("{url: redis://127.0.0.1, tls: {ca: ca.pem}}", "certificates, but the URL is not rediss://"),
        ("{url: rediss://127.0.0.1, tls: {cert: ca.pem}}", "`cert` without `key`"),
        ("{url: redis://127.0.0.1, username: me}", "`username` without `password`"),
        ("{url: redis://127.0.0.1, timeouts: {command: 2s}}", "a request waits at most 1s"),
        ("{url: redis://127.0.0.1, timeouts: {command: 0s}}", "must be longer than 0"),
        ("{url: redis://127.0.0.1, prefix: 'a{b}'}", "not a prefix for keys"),
        ("{url: redis://127.0.0.1, nodes: many}", "expected a number of gateways"),
        ("{url: redis://127.0.0.1, nodes: 0}", "expected a number of gateways"),
        ("{url: redis://127.0.0.1, pool: 0}", "must be at least 1"),
        ("{url: redis://127.0.0.1, hosts: x}", "unknown key 'hosts'"),
    ],
)
def test_settings_of_redis_that_are_refused(tmp_path: Path, settings: str, message: str) -> None:
    said = problems(tmp_path, CLUSTER, settings)
    assert any(message in problem.message for problem in said), [problem.render() for problem in said]
    assert not any("secret-word" in problem.render() for problem in said)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://cache.bank.test", "redis://cache.bank.test:6379/0"),
        ("rediss://Cache.Bank.test:7000/3", "rediss://cache.bank.test:7000/3"),
        ("redis://[::1]:7000", "redis://[::1]:7000/0"),
        ("unix:///run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
    ],
)
def test_urls(text: str, shown: str) -> None:
    assert str(parse_redis_url(text)) == shown


def test_a_password_on_its_way_in_the_clear_is_doubted(tmp_path: Path) -> None:
    said = problems(tmp_path, CLUSTER, "{url: redis://10.0.0.7, password: hunter2-hunter2}")
    only(said, "warning", "unencrypted")
    assert "hunter2" not in said[0].render().replace(said[0].source, "")
    assert problems(tmp_path, CLUSTER, "{url: redis://127.0.0.1, password: hunter2}") == []
    assert problems(tmp_path, CLUSTER, "{url: rediss://10.0.0.7, password: hunter2}") == []


def pair(folder: Path, name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    for suffix, how in ((".key", serialization.NoEncryption()), (".locked", serialization.BestAvailableEncryption(b"x"))):
        text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
        (folder / f"{name}{suffix}").write_bytes(text)


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        ("ca: missing.pem", "cannot read this file"),
        ("ca: empty.pem", "there is no certificate in this file"),
        ("ca: one.key", "there is no certificate in this file"),
        ("cert: one.pem, key: missing.key", "cannot read this file"),
        ("cert: one.pem, key: two.key", "do not make a pair"),
        ("cert: one.pem, key: one.locked", "the key is encrypted"),
        ("ca: two.pem, cert: one.pem, key: one.key", ""),
    ],
)
def test_certificates_are_tried(tmp_path: Path, tls: str, message: str) -> None:
    for name in ("one", "two"):
        pair(tmp_path, name)
    (tmp_path / "empty.pem").write_text("")
    said = problems(tmp_path, CLUSTER, f"{{url: rediss://127.0.0.1, tls: {{{tls}}}}}")
    if message:
        only(said, "error", message)
    else:
        assert said == []


def test_a_changed_certificate_changes_the_digest(tmp_path: Path) -> None:
    pair(tmp_path, "one")
    head = HEAD + "redis: {url: rediss://127.0.0.1, tls: {ca: one.pem}}\nroutes:\n"
    path = write(tmp_path, route("r", "prefix: /", CLUSTER), head)
    before = load(path).digest
    pair(tmp_path, "one")
    assert load(path).digest != before


@pytest.mark.parametrize(("policy", "loaded"), [(LOCAL, False), (CLUSTER, True), (QUOTA, True)])
def test_nothing_is_loaded_for_limits_of_one_machine(tmp_path: Path, policy: str, loaded: bool) -> None:
    redis = "redis: {url: redis://127.0.0.1}\n" if loaded else ""
    path = write(tmp_path, route("r", "prefix: /", policy), HEAD + redis + "routes:\n")
    program = (
        "import sys; from gateway.config import load; from gateway.snapshot import check; import gateway.server.worker\n"
        "assert not check(load(sys.argv[1]))\n"
        "print([name for name in ('redis', 'gateway.policies.cluster', 'gateway.policies.store', 'gateway.policies.leases',"
        " 'gateway._speedups.lease_table', 'gateway._speedups.leased_limit') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert len(done.stdout.split()) == (6 if loaded else 1), done.stdout
