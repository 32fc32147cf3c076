"""References and secrets: resolved from outside, and never to be seen again."""

import argparse
from pathlib import Path

import pytest

from gateway.cli import check
from gateway.config import findings, load
from gateway.config.source import mask
from gateway.errors import ConfigError

BASE = """\
version: 1
workers: 1
admin: {{bind: 127.0.0.1:9900, token: {token}}}
listeners:
  public: {{bind: 127.0.0.1:8080}}
upstreams:
  origin: {{targets: [{target}]}}
routes:
  - name: everything
    match: {{prefix: /}}
    upstream: {upstream}
"""
SECRET = "xq7-Zebra_Crossing"


def write(folder: Path, token: str = "null", target: str = "127.0.0.1:9001", upstream: str = "origin") -> Path:
    path = folder / "gateway.yaml"
    path.write_text(BASE.format(token=token, target=target, upstream=upstream))
    return path


def everything(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return whatever can be printed about the file: text, JSON, exception, repr, str and dumps."""
    parts = []
    for output in ("text", "json"):
        check.run(argparse.Namespace(config=str(path), file=None, strict=True, output=output))
        parts.append(capsys.readouterr().out)
    try:
        config = load(path)
    except ConfigError as error:
        parts += [str(error), repr(error), repr(error.problems)]
    else:
        parts += [
            repr(config),
            str(config),
            repr(config.model_dump()),
            config.model_dump_json(),
            repr(findings(config)),
        ]
        parts += [repr(config.admin), repr(config.upstreams), repr(config.admin.model_dump(by_alias=True))]
    return "\n".join(parts)


def test_references_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "payments.test")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("PORT", raising=False)
    (tmp_path / "token.txt").write_text(f"{SECRET}\n")
    config = load(write(tmp_path, '"${file:token.txt}"', '"${env:HOST}:${env:PORT:-81}", "${env:EMPTY:-b.test}:80"'))
    assert config.admin.token is not None and config.admin.token.get_secret_value() == SECRET
    assert [str(endpoint.address) for endpoint in config.upstreams["origin"].targets] == [
        "payments.test:81",
        "b.test:80",
    ]


def test_a_doubled_dollar_is_literal(tmp_path: Path) -> None:
    config = load(write(tmp_path, '"$${env:HOME}"'))
    assert config.admin.token is not None and config.admin.token.get_secret_value() == "${env:HOME}"


@pytest.mark.parametrize(
    ("token", "column", "width", "message", "hint"),
    [
        ('"${env:NOT_THERE}"', 39, 16, "environment variable NOT_THERE is not set", "export NOT_THERE"),
        ('"a-${env:NOT_THERE}"', 41, 16, "environment variable NOT_THERE is not set", "export NOT_THERE"),
        ('"${file:absent.txt}"', 39, 18, "cannot read absent.txt: No such file", "paths are relative to this file"),
        ('"${vault:x}"', 39, 10, "unknown reference ${vault:x}", "write ${env:NAME}"),
        ('"${env:1x}"', 39, 9, "unknown reference ${env:1x}", "write ${env:NAME}"),
    ],
)
def test_an_undefined_reference_is_one_error_at_its_place(
    tmp_path: Path, token: str, column: int, width: int, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, token))
    (found,) = caught.value.problems
    assert (found.line, found.column, found.width) == (3, column, width)
    assert message in found.message and hint in found.hint


@pytest.mark.parametrize("reference", ["${env:SECRET}", "${file:secret.txt}", f"${{env:ABSENT:-{SECRET}}}"])
@pytest.mark.parametrize("field", ["token", "target", "upstream"])
@pytest.mark.parametrize(
    "extra",
    ["", "unknown_key: 1\n", "  bad: indent: here\n"],
    ids=["alone", "with another mistake", "with a syntax error"],
)
def test_a_value_from_outside_is_never_printed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reference: str,
    field: str,
    extra: str,
) -> None:
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.delenv("ABSENT", raising=False)
    (tmp_path / "secret.txt").write_text(SECRET)
    path = write(tmp_path, **{field: f'"{reference}"'})
    path.write_text(path.read_text() + extra)
    printed = everything(path, capsys)
    assert len(printed) > 100
    # The author's own line may show a default that stands in the file, except where a secret belongs.
    shown = [
        line
        for line in printed.splitlines()
        if SECRET in line and not (":-" in reference and reference in line and field != "token")
    ]
    assert shown == []


def test_a_good_value_from_outside_is_hidden_in_repr_and_dumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WHERE", "hidden-host.test:9001")
    path = write(tmp_path, target='"${env:WHERE}"')
    printed = everything(path, capsys)
    assert "hidden-host" not in printed and "***" in printed
    assert load(path).upstreams["origin"].targets[0].address.host == "hidden-host.test"


def test_a_literal_secret_is_hidden_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, token=SECRET)
    assert SECRET not in everything(path, capsys)
    path.write_text(path.read_text().replace("127.0.0.1:9900", "nonsense"))
    printed = everything(path, capsys)
    assert "token: ******" in printed and SECRET not in printed
    # A misspelt key does not make its value public.
    path.write_text(path.read_text().replace("token:", "tokn:"))
    printed = everything(path, capsys)
    assert "did you mean 'token'?" in printed and SECRET not in printed


def test_a_secret_that_is_too_short_is_refused_without_showing_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    path.write_text(
        path.read_text() + "policies:\n  t: {jwt: {issuer: i, audience: a, algorithms: [HS512], secret: k3y-abcdef}}\n"
    )
    printed = everything(path, capsys)
    assert "a secret for these algorithms needs at least 64 bytes" in printed
    assert "k3y-abcdef" not in printed


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("token: abc", "token: ***"),
        ('  secret: "a b"  # why', "  secret: *****  # why"),
        ("{bind: x, token: abc, y: z}", "{bind: x, token: ***, y: z}"),
        ("token: ${env:T}", "token: ${env:T}"),
        ("token: ${env:T:-abc}", "token: *************"),
        ("token_size: 8KiB", "token_size: 8KiB"),
        ("forward_token: true", "forward_token: true"),
        ("token: null", "token: null"),
        ("bank-token: {jwt: {}}", "bank-token: {jwt: {}}"),
        ("password: 'it''s'", "password: *******"),
    ],
)
def test_source_lines_are_masked_without_moving_the_caret(line: str, masked: str) -> None:
    assert mask(line) == masked
