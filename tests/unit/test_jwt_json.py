"""Strict base64url and JSON: one spelling, one meaning, bounded work."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.jwt_json import MAX_DEPTH, StrictError, decode_base64url, parse_object


@given(st.binary(max_size=200))
def test_every_byte_string_has_one_encoding(data: bytes) -> None:
    encoded = base64.urlsafe_b64encode(data).rstrip(b"=")
    assert decode_base64url(encoded) == data


@given(st.binary(max_size=40))
def test_what_decodes_is_canonical(segment: bytes) -> None:
    try:
        decoded = decode_base64url(segment)
    except StrictError:
        return
    assert base64.urlsafe_b64encode(decoded).rstrip(b"=") == segment


@pytest.mark.parametrize(
    "segment",
    [b"YQ==", b"YQ=", b"YWI=", b"YW I", b" YWJj", b"YWJj\n", b"YWJj\0", b"Y", b"YWJjZ", b"-+//", b"+/+/", b"YR", b"YWJ", b"YWJj!",
     b"YWJj.", b"%59QQ", "YWJjé".encode(), b"\xff\xff\xff\xff", b"="],
)
def test_refuses_other_spellings(segment: bytes) -> None:
    with pytest.raises(StrictError):
        decode_base64url(segment)


def test_reads_an_object() -> None:
    assert parse_object(b' {"a": [1, -2.5, true, null, "\\u00e9\\ud83d\\ude00"], "b": {}} \n') == {
        "a": [1, -2.5, True, None, "é😀"], "b": {},
    }


REFUSED = {
    "duplicate member": b'{"a":1,"a":1}',
    "duplicate member, escaped": b'{"a":1,"\\u0061":2}',
    "duplicate member, nested": b'{"x":[{"a":1,"a":2}]}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b'{"a":-Infinity}',
    "1e999": b'{"a":1e999}',
    "-1e999": b'{"a":-1e999}',
    "5000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "5000 digits after the point": b'{"a":0.' + b"9" * 5000 + b"}",
    "20 digits": b'{"a":10000000000000000000}',
    "3000 deep arrays": b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}",
    "3000 deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "one too deep": b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "comment": b'{"a":1/*x*/}',
    "trailing data": b'{"a":1}{"b":2}',
    "trailing comma": b'{"a":1,}',
    "single quotes": b"{'a':1}",
    "BOM": b'\xef\xbb\xbf{"a":1}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "UTF-16 without BOM": '{"a":1}'.encode("utf-16-le"),
    "UTF-32": '{"a":1}'.encode("utf-32-le"),
    "lone surrogate": b'{"a":"\\ud800"}',
    "lone surrogate in a name": b'{"\\udfff":1}',
    "surrogate bytes": b'{"a":"\xed\xa0\x80"}',
    "overlong": b'{"a":"\xc0\xaf"}',
    "latin-1": b'{"a":"\xe9"}',
    "raw control byte": b'{"a":"\n"}',
    "raw NUL": b'{"a":"\0"}',
    "leading zero": b'{"a":01}',
    "plus sign": b'{"a":+1}',
    "underscore": b'{"a":1_0}',
    "other digits": '{"a":٥}'.encode(),
    "form feed between": b'{"a":\x0c1}',
    "array": b'[{"a":1}]',
    "string": b'"a"',
    "null": b"null",
    "nothing": b"",
    "unclosed": b'{"a":"',
    "unclosed escape": b'{"a":"\\',
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_is_ambiguous(text: bytes) -> None:
    with pytest.raises(StrictError):
        parse_object(text)


def test_brackets_in_strings_do_not_nest() -> None:
    text = b'{"a":"' + b"[{" * 500 + b'\\"[", "b":[[]]}'
    assert len(parse_object(text)["a"]) == 1002
    siblings = b'{"a":[' + b",".join([b"[]"] * 500) + b"]}"
    assert len(parse_object(siblings)["a"]) == 500


@given(st.binary(max_size=60))
def test_no_other_exception_escapes(text: bytes) -> None:
    try:
        assert isinstance(parse_object(text), dict)
    except StrictError:
        pass
