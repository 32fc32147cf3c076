"""The byte scans that look at a block at a time, beside loops that look at one byte.

Strategy: the C of wire.pxd is compiled as it stands into a program of its own, once with the blocks of this machine and once with words of
eight bytes, which other machines use; both under AddressSanitizer where there is one. The program puts every byte at every place of blocks of
every length, each in memory of exactly its size, and stops at the first answer that differs from the plain loop's.
"""

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HARNESS = r"""
#include <stdio.h>
#include <stdlib.h>
static const char *const names[] = {"te", "via", "date", "proxy", "x-y-z9", "upgrade", "k8s-name", "forwarded", "content-type", "http2-settings",
    "x-forwarded-host", "x-forwarded-proto", "x-crossway-attempts-left", "access-control-request-headers"};
static int is_value(uint8_t c) { return c == 9 || (c >= 32 && c != 127); }
static int is_name(uint8_t c) { return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '-'; }
static int is_path(uint8_t c) { return is_name(c) || c == '.' || c == '/' || c == '_'; }
static size_t plain(const char *p, size_t n, int (*fits)(uint8_t)) {
    size_t i = 0;
    while (i < n && fits((uint8_t)p[i])) i++;
    return i;
}
static void same(size_t found, size_t expected, const char *what, size_t n, size_t at, int byte) {
    if (found == expected) return;
    printf("%s: %zu instead of %zu with byte %d at %zu of %zu\n", what, found, expected, byte, at, n);
    exit(1);
}
static void compare(const char *p, size_t n, size_t at, int byte) {
    same(cw_span_value(p, n), plain(p, n, is_value), "value", n, at, byte);
    same(cw_span_name(p, n), plain(p, n, is_name), "name", n, at, byte);
    same(cw_span_path(p, n), plain(p, n, is_path), "path", n, at, byte);
}
static void spans(void) {
    static const char fill[] = "a9-Z\t~\x80 ";
    for (size_t n = 0; n <= 50; n++) {
        char *p = malloc(n ? n : 1);
        for (size_t each = 0; each < sizeof fill - 1; each++)
            for (size_t at = 0; at < (n ? n : 1); at++)
                for (int byte = 0; byte < 256; byte++) {
                    memset(p, fill[each], n);
                    if (n) p[at] = (char)byte;
                    compare(p, n, at, byte);
                }
        for (int round = 0; round < 2000; round++) {
            for (size_t i = 0; i < n; i++) p[i] = (char)(rand() % 7 ? fill[rand() % 4] : rand());
            compare(p, n, 0, -1);
        }
        free(p);
    }
}
static void words(void) {
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        size_t n = strlen(names[k]);
        char *p = malloc(n), *lower = malloc(n);
        memcpy(lower, names[k], n);
        for (size_t at = 0; at < n; at++)
            for (int byte = 0; byte < 256; byte++)
                for (int upper = 0; upper < 2; upper++) {
                    for (size_t i = 0; i < n; i++) p[i] = upper && lower[i] >= 'a' ? (char)(lower[i] - 32) : lower[i];
                    p[at] = (char)byte;
                    same((size_t)cw_equals_word(p, lower, n), (size_t)cw_equals_folded(p, lower, n), names[k], n, at, byte);
                }
        free(p);
        free(lower);
    }
}
static void decimal(uint64_t v) {
    char out[20], expected[24];
    size_t n = (size_t)snprintf(expected, sizeof expected, "%llu", (unsigned long long)v);
    same(cw_put_decimal(out, v), n, expected, 0, 0, 0);
    same((size_t)memcmp(out, expected, n), 0, expected, 0, 0, 1);
}
int main(void) {
    spans();
    words();
    for (uint64_t v = 0; v < 200000; v++) decimal(v);
    for (uint64_t power = 10; power < 10000000000000000000ULL; power *= 10) { decimal(power - 1); decimal(power); decimal(power * 9 + 1); }
    decimal(UINT64_MAX);
    puts(CW_BLOCK == 16 ? "blocks" : "words");
    return 0;
}
"""


def declarations() -> str:
    """Return the C that wire.pxd holds between its quotes."""
    found = re.search(r'cdef extern from \*:\n    ("""\n.*?""")', (ROOT / "_speedups" / "wire.pxd").read_text("utf-8"), re.DOTALL)
    assert found is not None
    text = ast.literal_eval(found[1])
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("options", [[], ["-DCROSSWAY_PORTABLE"]], ids=["this machine's blocks", "words"])
def test_a_block_says_what_its_bytes_say(tmp_path: Path, options: list[str]) -> None:
    source = tmp_path / "scans.c"
    source.write_text(declarations() + HARNESS)
    compiler = [*shlex.split(os.environ.get("CC", "cc")), "-O2", "-Wall", "-Wno-unused", "-Werror", *options, str(source)]
    sanitized = [*compiler, "-fsanitize=address,undefined", "-fno-sanitize-recover", "-o", str(tmp_path / "scans")]
    if subprocess.run(sanitized, capture_output=True, check=False).returncode:  # a compiler without that library
        subprocess.run([*compiler, "-o", str(tmp_path / "scans")], check=True)
    done = subprocess.run([str(tmp_path / "scans")], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ("words\n" if options else done.stdout)
