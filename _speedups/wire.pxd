"""Byte classes, ASCII folding and number parsing, as inline functions over (pointer, length).

Strategy: one 256-byte table whose bits say where a byte may stand; every loop is bounded by the length that the caller
passes, so nothing here can read past it. Python is called from here: never.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #ifndef CROSSWAY_WIRE_H
    #define CROSSWAY_WIRE_H
    #include <stdint.h>
    #include <string.h>
    /* RFC 9110 5.6.2 token; 5.5 field-value; RFC 3986 3.3 pchar and "/" without ";" and "%". */
    enum { CW_TOKEN = 1, CW_VALUE = 2, CW_PLAIN = 4, CW_TARGET = 8, CW_HOST = 16, CW_ALNUM = 32, CW_UNRESERVED = 64, CW_UPPER = 128 };
    static const uint8_t cw_class[256] = {
        ['\\t'] = CW_VALUE, [' '] = CW_VALUE,
        ['!'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST,
        ['"'] = CW_VALUE|CW_TARGET, ['#'] = CW_TOKEN|CW_VALUE,
        ['$'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST,
        ['%'] = CW_TOKEN|CW_VALUE|CW_TARGET,
        ['&'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST,
        ['\\''] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST,
        ['('] = CW_VALUE|CW_PLAIN|CW_TARGET, [')'] = CW_VALUE|CW_PLAIN|CW_TARGET,
        ['*'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET,
        ['+'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET,
        [','] = CW_VALUE|CW_PLAIN|CW_TARGET,
        ['-'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST|CW_UNRESERVED,
        ['.'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST|CW_UNRESERVED,
        ['/'] = CW_VALUE|CW_PLAIN|CW_TARGET,
        ['0' ... '9'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST|CW_ALNUM|CW_UNRESERVED,
        [':'] = CW_VALUE|CW_PLAIN|CW_TARGET, [';'] = CW_VALUE|CW_TARGET,
        ['<'] = CW_VALUE|CW_TARGET, ['='] = CW_VALUE|CW_PLAIN|CW_TARGET, ['>'] = CW_VALUE|CW_TARGET,
        ['?'] = CW_VALUE|CW_TARGET, ['@'] = CW_VALUE|CW_PLAIN|CW_TARGET,
        ['A' ... 'Z'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST|CW_ALNUM|CW_UNRESERVED|CW_UPPER,
        ['['] = CW_VALUE|CW_TARGET, ['\\\\'] = CW_VALUE|CW_TARGET, [']'] = CW_VALUE|CW_TARGET,
        ['^'] = CW_TOKEN|CW_VALUE|CW_TARGET,
        ['_'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST|CW_UNRESERVED,
        ['`'] = CW_TOKEN|CW_VALUE|CW_TARGET,
        ['a' ... 'z'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST|CW_ALNUM|CW_UNRESERVED,
        ['{'] = CW_VALUE|CW_TARGET, ['|'] = CW_TOKEN|CW_VALUE|CW_TARGET, ['}'] = CW_VALUE|CW_TARGET,
        ['~'] = CW_TOKEN|CW_VALUE|CW_PLAIN|CW_TARGET|CW_HOST|CW_UNRESERVED,
        [0x80 ... 0xff] = CW_VALUE,
    };
    /* Hexadecimal digit values plus one; 0 marks a byte that is no hex digit. */
    static const uint8_t cw_hex[256] = {
        ['0'] = 1, ['1'] = 2, ['2'] = 3, ['3'] = 4, ['4'] = 5, ['5'] = 6, ['6'] = 7, ['7'] = 8, ['8'] = 9, ['9'] = 10,
        ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16,
        ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
    };
    /* Length of the prefix of p[0..n) whose bytes all carry a class in `mask`. */
    static inline size_t cw_span(const char *p, size_t n, uint8_t mask) {
        size_t i = 0;
        while (i < n && (cw_class[(uint8_t)p[i]] & mask)) i++;
        return i;
    }
    /* The same for field values, eight bytes a step: a byte below 0x20 or equal to 0x7f ends the fast loop (SWAR "has
       byte less than" and "has zero byte"); HTAB, which is allowed, is sorted out by the table. */
    static inline size_t cw_span_value(const char *p, size_t n) {
        size_t i = 0;
        while (i < n) {
            while (n - i >= 8) {
                uint64_t v, d;
                memcpy(&v, p + i, 8);
                d = v ^ 0x7f7f7f7f7f7f7f7fULL;
                if ((((v - 0x2020202020202020ULL) & ~v) | ((d - 0x0101010101010101ULL) & ~d)) & 0x8080808080808080ULL) break;
                i += 8;
            }
            if (i >= n) break;
            if (!(cw_class[(uint8_t)p[i]] & CW_VALUE)) return i;
            i++;
        }
        return n;
    }
    static inline uint8_t cw_lower(uint8_t c) { return (cw_class[c] & CW_UPPER) ? (uint8_t)(c | 0x20) : c; }
    /* ASCII case-insensitive equality with `lower`, which is lower case already. */
    static inline int cw_equals_folded(const char *p, const char *lower, size_t n) {
        for (size_t i = 0; i < n; i++)
            if (cw_lower((uint8_t)p[i]) != (uint8_t)lower[i]) return 0;
        return 1;
    }
    /* Field-name folding as an application server does it: everything that is no letter or digit becomes '-'. */
    static inline uint8_t cw_fold_name(uint8_t c) { return (cw_class[c] & CW_ALNUM) ? cw_lower(c) : (uint8_t)'-'; }
    static inline int cw_equals_name(const char *p, const char *lower, size_t n) {
        for (size_t i = 0; i < n; i++)
            if (cw_fold_name((uint8_t)p[i]) != (uint8_t)lower[i]) return 0;
        return 1;
    }
    /* Decimal digits only, at most 19 of them, no sign, no space; -1 when it is anything else or above 2^63-1. */
    static inline int64_t cw_decimal(const char *p, size_t n) {
        uint64_t v = 0;
        if (n == 0 || n > 19) return -1;
        for (size_t i = 0; i < n; i++) {
            uint8_t d = (uint8_t)(p[i] - '0');
            if (d > 9) return -1;
            v = v * 10 + d;                      /* 10^19 - 1 fits into 64 bits */
        }
        return v > 0x7fffffffffffffffULL ? -1 : (int64_t)v;
    }
    /* Decimal into out (at least 20 bytes); returns the length. */
    static inline size_t cw_put_decimal(char *out, uint64_t v) {
        char t[20];
        size_t n = 0;
        do { t[n++] = (char)('0' + v % 10); v /= 10; } while (v);
        for (size_t i = 0; i < n; i++) out[i] = t[n - 1 - i];
        return n;
    }
    static inline size_t cw_put_hex(char *out, uint64_t v) {
        char t[16];
        size_t n = 0;
        do { t[n++] = "0123456789abcdef"[v & 15]; v >>= 4; } while (v);
        for (size_t i = 0; i < n; i++) out[i] = t[n - 1 - i];
        return n;
    }
    /* 64-bit mix of a byte string (FNV-1a with a final avalanche). For tables whose keys an attacker cannot choose to
       collide usefully; keyed hashing is token_cache's. */
    static inline uint64_t cw_hash(const char *p, size_t n, uint64_t seed) {
        uint64_t h = seed ^ 0xcbf29ce484222325ULL;
        for (size_t i = 0; i < n; i++) { h ^= (uint8_t)p[i]; h *= 0x100000001b3ULL; }
        h ^= h >> 33; h *= 0xff51afd7ed558ccdULL; h ^= h >> 33; h *= 0xc4ceb9fe1a85ec53ULL; h ^= h >> 33;
        return h;
    }
    /* The usual reason phrase of a status (RFC 9110 15). */
    static inline const char *cw_reason(int status) {
        switch (status) {
            case 200: return "OK"; case 201: return "Created"; case 202: return "Accepted"; case 204: return "No Content";
            case 301: return "Moved Permanently"; case 302: return "Found"; case 303: return "See Other";
            case 304: return "Not Modified"; case 307: return "Temporary Redirect"; case 308: return "Permanent Redirect";
            case 400: return "Bad Request"; case 401: return "Unauthorized"; case 402: return "Payment Required";
            case 403: return "Forbidden"; case 404: return "Not Found"; case 405: return "Method Not Allowed";
            case 406: return "Not Acceptable"; case 408: return "Request Timeout"; case 409: return "Conflict";
            case 410: return "Gone"; case 411: return "Length Required"; case 412: return "Precondition Failed";
            case 413: return "Content Too Large"; case 414: return "URI Too Long"; case 415: return "Unsupported Media Type";
            case 417: return "Expectation Failed"; case 421: return "Misdirected Request";
            case 422: return "Unprocessable Content"; case 425: return "Too Early"; case 426: return "Upgrade Required"; case 428: return "Precondition Required";
            case 429: return "Too Many Requests"; case 431: return "Request Header Fields Too Large";
            case 451: return "Unavailable For Legal Reasons"; case 500: return "Internal Server Error";
            case 501: return "Not Implemented"; case 502: return "Bad Gateway"; case 503: return "Service Unavailable";
            case 504: return "Gateway Timeout"; case 505: return "HTTP Version Not Supported";
            default: return "Status";
        }
    }
    #endif
    """
    enum: CW_TOKEN, CW_VALUE, CW_PLAIN, CW_TARGET, CW_HOST, CW_ALNUM, CW_UNRESERVED, CW_UPPER
    const uint8_t cw_class[256]
    const uint8_t cw_hex[256]
    size_t cw_span(const char* p, size_t n, uint8_t mask) nogil
    size_t cw_span_value(const char* p, size_t n) nogil
    uint8_t cw_lower(uint8_t c) nogil
    bint cw_equals_folded(const char* p, const char* lower, size_t n) nogil
    uint8_t cw_fold_name(uint8_t c) nogil
    bint cw_equals_name(const char* p, const char* lower, size_t n) nogil
    int64_t cw_decimal(const char* p, size_t n) nogil
    size_t cw_put_decimal(char* out, uint64_t v) nogil
    size_t cw_put_hex(char* out, uint64_t v) nogil
    uint64_t cw_hash(const char* p, size_t n, uint64_t seed) nogil
    const char* cw_reason(int status) nogil
