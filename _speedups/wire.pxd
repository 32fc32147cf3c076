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
    /* A block of bytes that are looked at together: 16 with SSE2, which every x86-64 has, else 8 in a word. A test marks each byte
       of a block, exactly and for itself alone; `cw_marks` makes a number of the marks, the first byte lowest. Both kinds give the same
       answers (tests/unit/test_wire.py asks for every byte at every place). */
    #if defined(__SSE2__) && !defined(CROSSWAY_PORTABLE)
    #include <emmintrin.h>
    typedef __m128i cw_block;
    enum { CW_BLOCK = 16, CW_MARK = 1 };             /* bytes of a block; bits of a mark */
    static inline cw_block cw_load(const char *p) { return _mm_loadu_si128((const __m128i *)p); }
    static inline cw_block cw_is(cw_block v, uint8_t c) { return _mm_cmpeq_epi8(v, _mm_set1_epi8((char)c)); }
    /* low <= byte <= high, unsigned; high below 0x80 */
    static inline cw_block cw_within(cw_block v, uint8_t low, uint8_t high) {
        v = _mm_sub_epi8(v, _mm_set1_epi8((char)low));
        return _mm_cmpeq_epi8(_mm_min_epu8(v, _mm_set1_epi8((char)(high - low))), v);
    }
    static inline cw_block cw_either(cw_block a, cw_block b) { return _mm_or_si128(a, b); }
    static inline cw_block cw_without(cw_block a, cw_block b) { return _mm_andnot_si128(b, a); }
    static inline cw_block cw_bit5(cw_block v) { return _mm_or_si128(v, _mm_set1_epi8(0x20)); }
    static inline uint64_t cw_marks(cw_block v) { return (uint64_t)(uint32_t)_mm_movemask_epi8(v); }
    #define CW_ALL 0xffffULL
    #else
    typedef uint64_t cw_block;
    enum { CW_BLOCK = 8, CW_MARK = 8 };
    #define CW_EACH(c) (0x0101010101010101ULL * (uint8_t)(c))
    static inline cw_block cw_load(const char *p) {
        uint64_t v;
        memcpy(&v, p, 8);
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        v = __builtin_bswap64(v);
    #endif
        return v;
    }
    /* Sums of seven bits each stay in their bytes: no carry from one byte to the next. */
    static inline cw_block cw_is(cw_block v, uint8_t c) {
        uint64_t x = v ^ CW_EACH(c);
        return ~(((x & CW_EACH(0x7f)) + CW_EACH(0x7f)) | x) & CW_EACH(0x80);
    }
    static inline cw_block cw_within(cw_block v, uint8_t low, uint8_t high) {
        uint64_t x = v & CW_EACH(0x7f);
        uint64_t least = low ? x + CW_EACH(0x80 - low) : CW_EACH(0x80);
        return least & ~(x + CW_EACH(0x7f - high)) & ~v & CW_EACH(0x80);
    }
    static inline cw_block cw_either(cw_block a, cw_block b) { return a | b; }
    static inline cw_block cw_without(cw_block a, cw_block b) { return a & ~b; }
    static inline cw_block cw_bit5(cw_block v) { return v | CW_EACH(0x20); }
    static inline uint64_t cw_marks(cw_block v) { return v & CW_EACH(0x80); }
    #define CW_ALL CW_EACH(0x80)
    #endif
    static inline uint64_t cw_no_value(cw_block v) {
        return cw_marks(cw_either(cw_without(cw_within(v, 0, 0x1f), cw_is(v, '\\t')), cw_is(v, 0x7f)));
    }
    static inline uint64_t cw_no_name(cw_block v) {
        return CW_ALL ^ cw_marks(cw_either(cw_either(cw_within(cw_bit5(v), 'a', 'z'), cw_within(v, '0', '9')), cw_is(v, '-')));
    }
    static inline uint64_t cw_no_path(cw_block v) {
        return CW_ALL ^ cw_marks(cw_either(cw_either(cw_within(cw_bit5(v), 'a', 'z'), cw_within(v, '-', '9')), cw_is(v, '_')));
    }
    /* Length of the prefix of p[0..n) before the first byte that STOPS marks; TABLE says the same of a byte c. Every block lies
       inside p[0..n): the last one ends at n and goes over bytes again that were found clean; what is shorter than a block goes
       byte by byte. */
    #define CW_SCAN(NAME, STOPS, TABLE) \\
        static inline size_t NAME(const char *p, size_t n) { \\
            size_t i = 0; \\
            if (n >= CW_BLOCK) { \\
                for (;;) { \\
                    uint64_t stops = STOPS(cw_load(p + i)); \\
                    if (stops) return i + (size_t)__builtin_ctzll(stops) / CW_MARK; \\
                    i += CW_BLOCK; \\
                    if (n - i < CW_BLOCK) { \\
                        if (i == n) return n; \\
                        i = n - CW_BLOCK; \\
                    } \\
                } \\
            } \\
            for (; i < n; i++) { \\
                uint8_t c = (uint8_t)p[i]; \\
                if (!(TABLE)) break; \\
            } \\
            return i; \\
        }
    /* Of field-value bytes (CW_VALUE). */
    CW_SCAN(cw_span_value, cw_no_value, cw_class[c] & CW_VALUE)
    /* Of letters, digits and '-', as nearly all field names are: a part of CW_TOKEN. */
    CW_SCAN(cw_span_name, cw_no_name, (cw_class[c] & CW_ALNUM) || c == '-')
    /* Of letters, digits and "-./_", as most paths are: a part of CW_PLAIN. */
    CW_SCAN(cw_span_path, cw_no_path, (cw_class[c] & CW_ALNUM) || c == '_' || (c >= '-' && c <= '/'))
    static inline uint8_t cw_lower(uint8_t c) { return (cw_class[c] & CW_UPPER) ? (uint8_t)(c | 0x20) : c; }
    /* ASCII case-insensitive equality with `lower`, which is lower case already. */
    static inline int cw_equals_folded(const char *p, const char *lower, size_t n) {
        for (size_t i = 0; i < n; i++)
            if (cw_lower((uint8_t)p[i]) != (uint8_t)lower[i]) return 0;
        return 1;
    }
    /* The same, up to eight bytes a step, for a `lower` of letters, digits and '-' only: of these the letters have bit 6, and a letter may
       differ in bit 5. The last step ends at n and may look at bytes twice. */
    static inline int cw_word_differs(const char *p, const char *lower) {
        uint64_t a, b;
        memcpy(&a, p, 8);
        memcpy(&b, lower, 8);
        return ((a ^ b) & ~((b & 0x4040404040404040ULL) >> 1)) != 0;
    }
    static inline int cw_half_differs(const char *p, const char *lower) {
        uint32_t a, b;
        memcpy(&a, p, 4);
        memcpy(&b, lower, 4);
        return ((a ^ b) & ~((b & 0x40404040U) >> 1)) != 0;
    }
    static inline int cw_equals_word(const char *p, const char *lower, size_t n) {
        size_t i = 0;
        if (n < 4) return cw_equals_folded(p, lower, n);
        if (n < 8) return !cw_half_differs(p, lower) && !cw_half_differs(p + n - 4, lower + n - 4);
        for (; n - i > 8; i += 8)
            if (cw_word_differs(p + i, lower + i)) return 0;
        return !cw_word_differs(p + n - 8, lower + n - 8);
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
        size_t n = 1, at;
        for (uint64_t w = v; w >= 10; n++) {
            if (w >= 10000) { w /= 10000; n += 3; } else w = w >= 1000 ? (n += 2, 1) : w >= 100 ? (n++, 1) : 1;
        }
        for (at = n; v >= 10; v /= 100) {            /* two digits a step, from the last */
            unsigned pair = (unsigned)(v % 100);
            out[--at] = (char)('0' + pair % 10);
            out[--at] = (char)('0' + pair / 10);
        }
        if (at) out[0] = (char)('0' + v);
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
    size_t cw_span_name(const char* p, size_t n) nogil
    size_t cw_span_path(const char* p, size_t n) nogil
    uint8_t cw_lower(uint8_t c) nogil
    bint cw_equals_folded(const char* p, const char* lower, size_t n) nogil
    bint cw_equals_word(const char* p, const char* lower, size_t n) nogil
    uint8_t cw_fold_name(uint8_t c) nogil
    bint cw_equals_name(const char* p, const char* lower, size_t n) nogil
    int64_t cw_decimal(const char* p, size_t n) nogil
    size_t cw_put_decimal(char* out, uint64_t v) nogil
    size_t cw_put_hex(char* out, uint64_t v) nogil
    uint64_t cw_hash(const char* p, size_t n, uint64_t seed) nogil
    const char* cw_reason(int status) nogil
