"""TLS sessions over non-blocking sockets; see tls.pxd.

Strategy: TLS 1.2 with ECDHE and AEAD, and TLS 1.3; no renegotiation, no compression, no early data. A client's certificate is
verified with its chain, validity and revocation at every handshake: listeners that ask for one do not resume sessions.
Ticket keys lie in memory that all processes share since the import, before any fork; the supervisor alone replaces them.
Python is called from here: per connection and per handshake, never per record.

Safety: SSL_set_app_data() and the callbacks' arguments borrow Python objects. A Tls is alive while any call into its SSL runs;
it holds its TlsListener or TlsUpstream, which holds the contexts. The Wire lies inside the Tls, whose BIOs are freed with the
SSL in __dealloc__. Callbacks do not raise.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy, memset
from gateway._speedups.certificates cimport Certificate, ClientCertificate, OcspResponse, PrivateKey, RevocationList
from gateway._speedups.certificates cimport openssl_reason, wrap_certificate
from gateway._speedups.openssl cimport *
from gateway._speedups.sockets cimport EAGAIN, ECONNRESET, cw_monotonic_us, cw_nodelay, cw_wall_us, iovec

import hashlib
import ipaddress

from gateway._speedups.certificates import TlsError

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <errno.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/random.h>
    #include <sys/socket.h>
    #include <openssl/bio.h>
    #include <openssl/core_names.h>
    #include <openssl/err.h>
    #include <openssl/evp.h>
    #include <openssl/ssl.h>

    /* Must match Wire in tls.pxd. */
    typedef struct { int fd, dry, ended, eof, error, stirred, spoken, more, held; } cw_wire;
    #define CW_STIRRED_MAX 64

    static int cw_bio_read(BIO *b, char *out, int n) {
        cw_wire *w = BIO_get_data(b);
        ssize_t r;
        BIO_clear_retry_flags(b);
        if (w->stirred > CW_STIRRED_MAX) { w->error = EPROTO; return -1; }
        if (w->dry) { BIO_set_retry_read(b); return -1; }
        do r = recv(w->fd, out, (size_t)n, 0); while (r < 0 && errno == EINTR);
        if (r > 0) {
            if (r < n && !w->ended) w->dry = 1;
            return (int)r;
        }
        if (r == 0) { w->eof = 1; return 0; }
        if (errno == EAGAIN || errno == EWOULDBLOCK) { w->dry = 1; BIO_set_retry_read(b); }
        else w->error = errno;
        return -1;
    }
    static int cw_bio_write(BIO *b, const char *data, int n) {
        cw_wire *w = BIO_get_data(b);
        int flags = MSG_NOSIGNAL | MSG_DONTWAIT | (w->more ? MSG_MORE : 0);
        ssize_t r;
        BIO_clear_retry_flags(b);
        do r = send(w->fd, data, (size_t)n, flags); while (r < 0 && errno == EINTR);
        if (r >= 0) { w->spoken = 1; w->held = w->more; return (int)r; }
        if (errno == EAGAIN || errno == EWOULDBLOCK) BIO_set_retry_write(b);
        else w->error = errno;
        return -1;
    }
    static long cw_bio_ctrl(BIO *b, int command, long n, void *p) {
        (void)n; (void)p;
        if (command == BIO_CTRL_FLUSH || command == BIO_CTRL_DUP) return 1;
        if (command == BIO_CTRL_EOF) return ((cw_wire *)BIO_get_data(b))->eof;
        return 0;
    }
    static BIO_METHOD *cw_bio_method(void) {
        static BIO_METHOD *m;
        if (!m && (m = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "crossway"))) {
            BIO_meth_set_read(m, cw_bio_read);
            BIO_meth_set_write(m, cw_bio_write);
            BIO_meth_set_ctrl(m, cw_bio_ctrl);
        }
        return m;
    }
    /* The file that a function came from. */
    static const char *cw_file_of(void *function) {
        Dl_info found;
        return dladdr(function, &found) && found.dli_fname ? found.dli_fname : "";
    }
    static const char *cw_tls_file(void) { return cw_file_of((void *)SSL_new); }
    static const char *cw_crypto_file(void) { return cw_file_of((void *)EVP_EncryptInit_ex); }
    static const char *cw_tls_version(void) { return OpenSSL_version(OPENSSL_VERSION); }
    static BIO *cw_bio_new(void *wire) {
        BIO_METHOD *m = cw_bio_method();
        BIO *b = m ? BIO_new(m) : NULL;
        if (b) { BIO_set_data(b, wire); BIO_set_init(b, 1); }
        return b;
    }
    /* ERR_clear_error() walks through the whole queue, which is empty nearly always. */
    static inline void cw_clear_errors(void) { if (ERR_peek_error()) ERR_clear_error(); }
    /* Key updates, renegotiation attempts and alerts cost work and carry nothing (CVE-2026-32283). */
    static void cw_on_info(const SSL *ssl, int where, int result) {
        cw_wire *w = SSL_get_ex_data(ssl, 1);
        (void)result;
        if (w && (where & (SSL_CB_HANDSHAKE_START | SSL_CB_ALERT)) && SSL_is_init_finished(ssl)) w->stirred++;
    }

    /* Ticket keys: [0] encrypts, all decrypt. One writer (the supervisor); readers copy and look at `turn` again. */
    #define CW_TICKET_KEYS 3
    typedef struct { unsigned char name[16], cipher[32], mac[32]; } cw_ticket_key;
    typedef struct { uint64_t turn; cw_ticket_key keys[CW_TICKET_KEYS]; } cw_ticket_ring;
    static cw_ticket_ring *cw_ring;
    static EVP_CIPHER *cw_ticket_cipher;    /* fetched once: EVP_aes_256_cbc() is looked up anew by each use */
    static int cw_fill(void *p, size_t n) { return getrandom(p, n, 0) == (ssize_t)n; }
    static int cw_ring_make(void) {
        cw_ring = mmap(NULL, sizeof *cw_ring, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (cw_ring == MAP_FAILED) { cw_ring = NULL; return 0; }
        (void)madvise(cw_ring, sizeof *cw_ring, MADV_DONTDUMP);
        cw_ticket_cipher = EVP_CIPHER_fetch(NULL, "AES-256-CBC", NULL);
        return cw_ticket_cipher && cw_fill(cw_ring->keys, sizeof cw_ring->keys);
    }
    static int cw_ring_turn(void) {
        cw_ticket_key fresh;
        if (!cw_fill(&fresh, sizeof fresh)) return 0;
        __atomic_store_n(&cw_ring->turn, cw_ring->turn + 1, __ATOMIC_SEQ_CST);
        memmove(&cw_ring->keys[1], &cw_ring->keys[0], sizeof fresh * (CW_TICKET_KEYS - 1));
        cw_ring->keys[0] = fresh;
        __atomic_store_n(&cw_ring->turn, cw_ring->turn + 1, __ATOMIC_SEQ_CST);
        OPENSSL_cleanse(&fresh, sizeof fresh);
        return 1;
    }
    static int cw_ring_copy(cw_ticket_key *out) {
        for (int tries = 0; tries < 100000; tries++) {
            uint64_t turn = __atomic_load_n(&cw_ring->turn, __ATOMIC_ACQUIRE);
            if (turn & 1) continue;
            memcpy(out, cw_ring->keys, sizeof cw_ring->keys);
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if (__atomic_load_n(&cw_ring->turn, __ATOMIC_ACQUIRE) == turn) return 1;
        }
        return 0;
    }
    static int cw_ticket_set_up(EVP_MAC_CTX *mac, cw_ticket_key *key) {
        OSSL_PARAM params[3];
        params[0] = OSSL_PARAM_construct_octet_string(OSSL_MAC_PARAM_KEY, key->mac, sizeof key->mac);
        params[1] = OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, (char *)"SHA256", 0);
        params[2] = OSSL_PARAM_construct_end();
        return EVP_MAC_CTX_set_params(mac, params);
    }
    /* 1 sealed or opened, 2 opened and the client gets a new ticket, 0 full handshake, -1 failed. */
    static int cw_on_ticket(SSL *ssl, unsigned char *name, unsigned char *iv, EVP_CIPHER_CTX *cipher, EVP_MAC_CTX *mac, int seal) {
        cw_ticket_key keys[CW_TICKET_KEYS];
        int i = 0, result = -1;
        if (!cw_ring || !cw_ring_copy(keys)) return seal ? -1 : 0;
        if (seal) {
            memcpy(name, keys[0].name, 16);
            /* The kernel's generator costs one call; OpenSSL's costs its own reseeding checks and lock beside it. */
            if (cw_fill(iv, 16) && EVP_EncryptInit_ex(cipher, cw_ticket_cipher, NULL, keys[0].cipher, iv) == 1 &&
                cw_ticket_set_up(mac, &keys[0])) result = 1;
        } else {
            while (i < CW_TICKET_KEYS && memcmp(name, keys[i].name, 16)) i++;
            if (i == CW_TICKET_KEYS) result = 0;
            else if (cw_ticket_set_up(mac, &keys[i]) && EVP_DecryptInit_ex(cipher, cw_ticket_cipher, NULL, keys[i].cipher, iv) == 1)
                /* A TLS 1.3 client uses a ticket once (RFC 8446 C.4): without a new one every second visit would be a full handshake. */
                result = i || SSL_version(ssl) == TLS1_3_VERSION ? 2 : 1;
        }
        OPENSSL_cleanse(keys, sizeof keys);
        return result;
    }
    static void cw_seal_tickets(SSL_CTX *c) { SSL_CTX_set_tlsext_ticket_key_evp_cb(c, cw_on_ticket); }
    /* From the end of the handshake on: before it every step would be told, and none counts. */
    static void cw_watch_messages(SSL *ssl) { SSL_set_info_callback(ssl, cw_on_info); }
    /* ex_data 0 is SSL_set_app_data(); 1 is ours. */
    static int cw_reserve_index(void) { return SSL_get_ex_new_index(0, NULL, NULL, NULL, NULL) == 1; }
    static void cw_set_wire(SSL *ssl, void *wire) { SSL_set_ex_data(ssl, 1, wire); }
    """
    int EPROTO
    BIO* cw_bio_new(void* wire)
    const char* cw_tls_file()
    const char* cw_crypto_file()
    const char* cw_tls_version()
    void cw_clear_errors()
    int cw_ring_make()
    int cw_ring_turn()
    void cw_seal_tickets(SSL_CTX* context)
    void cw_watch_messages(SSL* ssl)
    int cw_reserve_index()
    void cw_set_wire(SSL* ssl, void* wire)

cdef enum:
    RECORD = 16384              # most plaintext in one record
    SESSIONS_KEPT = 8           # per endpoint
    CLIENT_CERTIFICATE_MAX = 65536      # bytes of a chain
    DEPTH = 8                   # intermediates
    ENDED = 1                   # Tls.failed: the other side ended in good order, and the next recv() says so
    SESSION_LIFE = 86400        # seconds; RFC 8446 allows seven days, a bank's auditors do not

cdef const char* SUITES_12 = (b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
                              b"ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305")
cdef const char* SUITES_13 = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
cdef dict ALPN_IDS = {b"http/1.1": ALPN_HTTP1, b"h2": ALPN_HTTP2}

cdef int live = 0
cdef char gathered[16384]

if not cw_reserve_index():
    raise ImportError("another library took the place in OpenSSL's sessions that this module needs")
if not cw_ring_make():
    raise MemoryError("no memory for ticket keys")


cdef int tls_live() noexcept:
    return live


def rotate_ticket_keys() -> None:
    """Put a new ticket key in front and forget the oldest, in all processes forked from this one. One process calls this."""
    if not cw_ring_turn():
        raise OSError("getrandom failed")


def libraries() -> list:
    """The OpenSSL that the engine uses: its version, and the files it was loaded from."""
    return [cw_tls_version().decode(), cw_tls_file().decode(), cw_crypto_file().decode()]


# -- contexts ---------------------------------------------------------------------------------------------------------

cdef class Context:
    """Owns an SSL_CTX."""

    cdef SSL_CTX* ctx

    def __dealloc__(self):
        SSL_CTX_free(self.ctx)


cdef Context new_context(bint server, bint newest_only, bint ktls):
    cdef Context made = Context.__new__(Context)
    cdef SSL_CTX* ctx
    ERR_clear_error()
    made.ctx = ctx = SSL_CTX_new(TLS_server_method() if server else TLS_client_method())
    if ctx == NULL:
        raise MemoryError
    SSL_CTX_set_security_level(ctx, 2)
    SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION if newest_only else TLS1_2_VERSION)
    if SSL_CTX_set_cipher_list(ctx, SUITES_12) != 1 or SSL_CTX_set_ciphersuites(ctx, SUITES_13) != 1:
        raise TlsError(f"OpenSSL offers none of the cipher suites: {openssl_reason()}")
    # Hybrid post-quantum key exchange where this OpenSSL has it (3.5 and newer).
    if SSL_CTX_set1_groups_list(ctx, b"X25519MLKEM768:X25519:P-256:P-384") != 1 and \
            SSL_CTX_set1_groups_list(ctx, b"X25519:P-256:P-384") != 1:
        raise TlsError(f"OpenSSL offers none of the groups: {openssl_reason()}")
    SSL_CTX_set_options(ctx, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE |
                        SSL_OP_PRIORITIZE_CHACHA | (SSL_OP_ENABLE_KTLS if ktls else 0))
    SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_NO_AUTO_CHAIN)
    SSL_CTX_set_read_ahead(ctx, not ktls)
    SSL_CTX_set_max_cert_list(ctx, CLIENT_CERTIFICATE_MAX)
    SSL_CTX_set_verify_depth(ctx, DEPTH)
    if server:
        cw_seal_tickets(ctx)
    ERR_clear_error()
    return made


cdef int use_pair(SSL_CTX* ctx, list chain, PrivateKey key) except -1:
    """The certificate (first of `chain`), its key, and what is sent behind it.

    A file without a chain gets what the context's authorities say of it. OpenSSL would look for that, signatures and all, in
    every handshake; it is found here once, after trust().
    """
    cdef Certificate certificate = <Certificate>chain[0]
    ERR_clear_error()
    if SSL_CTX_use_certificate(ctx, <X509*>certificate.x509) != 1:
        raise TlsError(f"the certificate cannot be used: {openssl_reason()}")
    if SSL_CTX_use_PrivateKey(ctx, <EVP_PKEY*>key.key) != 1 or SSL_CTX_check_private_key(ctx) != 1:
        ERR_clear_error()
        raise TlsError("the key does not belong to the certificate")
    for certificate in chain[1:]:
        if SSL_CTX_add1_chain_cert(ctx, <X509*>certificate.x509) != 1:
            raise TlsError(f"a certificate of the chain cannot be used: {openssl_reason()}")
    if len(chain) == 1:
        SSL_CTX_build_cert_chain(ctx, SSL_BUILD_CHAIN_FLAG_IGNORE_ERROR)     # none found: the certificate alone
        ERR_clear_error()
    return 0


cdef int trust(SSL_CTX* ctx, list authorities, list revocations, bint announce) except -1:
    cdef Certificate authority
    cdef RevocationList crl
    cdef X509_STORE* store = SSL_CTX_get_cert_store(ctx)
    for authority in authorities:
        if X509_STORE_add_cert(store, <X509*>authority.x509) != 1:
            raise TlsError(f"a certificate authority cannot be used: {openssl_reason()}")
        if announce and SSL_CTX_add_client_CA(ctx, <X509*>authority.x509) != 1:
            raise TlsError(f"a certificate authority cannot be used: {openssl_reason()}")
    for crl in revocations:
        if X509_STORE_add_crl(store, <X509_CRL*>crl.crl) != 1:
            raise TlsError(f"a revocation list cannot be used: {openssl_reason()}")
    if revocations:
        X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL)
    return 0


cdef bytes protocol_list(names):
    return b"".join([bytes([len(name)]) + name.encode("ascii") for name in names])


cdef class TlsListener:
    """How a listener speaks TLS.

    pairs: (chain, key, staple or None) for each certificate, the first one for clients that name no host we know. `digest`
    names everything that was read, so that a ticket of other settings is not taken.
    """

    def __init__(self, str name not None, list pairs not None, *, bytes digest not None, authorities=(), revocations=(),
                 str client_auth="off", str min_version="1.2", alpn=("http/1.1",), double handshake=10, int handshakes=1000,
                 bint ktls=False, bint tickets=True, bint forward_certificate=False, admit=None):
        self.name = name
        self.admit = admit
        self.digest = digest
        self.alpn = protocol_list(alpn)
        self.forward_certificate = forward_certificate
        self.ktls = ktls
        self.asks = client_auth != "off"
        self.handshake_us = <int64_t>(handshake * 1e6)
        self.handshakes_max = handshakes
        self.contexts = []
        self.by_name = {}
        self.staples = {}
        identity = hashlib.sha256(name.encode() + b"\0" + digest).digest()
        made = {}
        for serves in self.groups(pairs):
            context = made.get(serves)
            if context is None:
                context = new_context(True, min_version == "1.3", ktls)
                made[serves] = context
                self.contexts.append(context)
                set_up(self, context, [pairs[i] for i in serves], identity, list(authorities), list(revocations), client_auth, tickets)
        self.first = <void*>(<Context>self.contexts[0]).ctx
        self.by_name = {server: made[serves] for server, serves in self.names(pairs).items()}

    cdef list groups(self, list pairs):
        """Which pairs serve together: for each name those that carry it, one of a kind; the default's group first."""
        names = self.names(pairs)
        of_first = names.get(next(iter(pairs[0][0][0].dns), "").lower().encode("ascii"), (0,))
        return [of_first if of_first[0] == 0 else (0,), *names.values()]

    cdef dict names(self, list pairs):
        """Server name -> indexes of the pairs that serve it, at most one for each kind of key."""
        found = {}
        for i, (chain, key, _) in enumerate(pairs):
            for server in chain[0].dns:
                present = found.setdefault(server.lower().encode("ascii"), [])
                if key.kind not in [pairs[other][1].kind for other in present]:
                    present.append(i)
        return {server: tuple(indexes) for server, indexes in found.items()}

    cdef Tls accept(self, int fd):
        cdef Tls made = new_session(self, <SSL_CTX*>self.first, fd, self.ktls)
        SSL_set_accept_state(<SSL*>made.ssl)
        made.accepting = True
        return made

    @property
    def server_names(self) -> list:
        """The names that have a certificate of their own."""
        return sorted(name.decode("ascii") for name in self.by_name)


cdef int set_up(TlsListener self, Context context, list pairs, bytes identity, list authorities, list revocations,
                str client_auth, bint tickets) except -1:
    """One of the listener's contexts: they differ in their certificates only."""
    cdef SSL_CTX* ctx = context.ctx
    if self.asks:
        trust(ctx, authorities, revocations, True)
        SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | (SSL_VERIFY_FAIL_IF_NO_PEER_CERT if client_auth == "required" else 0), NULL)
    for chain, key, staple in pairs:
        use_pair(ctx, chain, key)
        if staple is not None:
            self.staples[chain[0].der] = staple
    SSL_CTX_set_session_id_context(ctx, <const unsigned char*>PyBytes_AS_STRING(identity), 32)
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF)
    SSL_CTX_set_timeout(ctx, SESSION_LIFE)
    if self.asks or not tickets:
        SSL_CTX_set_options(ctx, SSL_OP_NO_TICKET)
        SSL_CTX_set_num_tickets(ctx, 0)
    SSL_CTX_set_alpn_select_cb(ctx, on_alpn, <void*>self)
    SSL_CTX_set_tlsext_servername_callback(ctx, on_server_name)
    SSL_CTX_set_tlsext_servername_arg(ctx, <void*>self)
    if any([staple is not None for _, _, staple in pairs]):
        SSL_CTX_set_tlsext_status_cb(ctx, on_status)
        SSL_CTX_set_tlsext_status_arg(ctx, <void*>self)
    return 0


cdef int on_server_name(SSL* ssl, int* alert, void* argument) noexcept:
    """Chooses the certificate: exact name, then wildcard, then the first one."""
    cdef TlsListener listener = <TlsListener>argument
    cdef const char* name = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name)
    cdef Context context
    if name == NULL:
        return SSL_TLSEXT_ERR_NOACK
    try:
        wanted = (<bytes>name).lower().removesuffix(b".")
        found = listener.by_name.get(wanted)
        if found is None:
            found = listener.by_name.get(b"*." + wanted.partition(b".")[2])
        if found is None:
            return SSL_TLSEXT_ERR_NOACK
        context = <Context>found
        SSL_set_SSL_CTX(ssl, context.ctx)
        return SSL_TLSEXT_ERR_OK
    except Exception:
        return SSL_TLSEXT_ERR_ALERT_FATAL


cdef int on_alpn(SSL* ssl, const unsigned char** out, unsigned char* length, const unsigned char* theirs,
                 unsigned int their_length, void* argument) noexcept:
    cdef TlsListener listener = <TlsListener>argument
    if not PyBytes_GET_SIZE(listener.alpn):
        return SSL_TLSEXT_ERR_NOACK             # what is spoken above TLS is not known here
    if SSL_select_next_proto(<unsigned char**>out, length, <const unsigned char*>PyBytes_AS_STRING(listener.alpn),
                             <unsigned int>PyBytes_GET_SIZE(listener.alpn), theirs, their_length) == OPENSSL_NPN_NEGOTIATED:
        return SSL_TLSEXT_ERR_OK
    return SSL_TLSEXT_ERR_ALERT_FATAL           # no_application_protocol, RFC 7301 3.2


cdef int on_status(SSL* ssl, void* argument) noexcept:
    """Staples the OCSP response of the certificate in use, unless it is out of date."""
    cdef TlsListener listener = <TlsListener>argument
    cdef X509* used = SSL_get_certificate(ssl)
    cdef void* copy
    try:
        if used == NULL:
            return SSL_TLSEXT_ERR_NOACK
        staple = listener.staples.get(wrap_certificate(used, False).der)
        if staple is None or 0 < staple.next_update * 1000000 <= cw_wall_us():
            return SSL_TLSEXT_ERR_NOACK
        copy = OPENSSL_memdup(PyBytes_AS_STRING(staple.der), len(staple.der))
        if copy == NULL:
            return SSL_TLSEXT_ERR_NOACK
        SSL_set_tlsext_status_ocsp_resp(ssl, <unsigned char*>copy, len(staple.der))
        return SSL_TLSEXT_ERR_OK
    except Exception:
        return SSL_TLSEXT_ERR_NOACK


cdef class Session:
    """Owns an SSL_SESSION that a server gave us."""

    cdef SSL_SESSION* session

    def __dealloc__(self):
        SSL_SESSION_free(self.session)


cdef class TlsUpstream:
    """How an upstream's connections speak TLS.

    sans: names of which the server's certificate must carry one (DNS names, or URIs such as SPIFFE ids) in place of the host
    name's own check. `alpn`: the protocols that are offered. Without http/1.1 among them, a server that selects none of them is
    refused: HTTP/1.1 is what silence means. `digest` names all settings and all that was read.
    """

    def __init__(self, *, bytes digest not None, authorities=(), revocations=(), list chain=None, PrivateKey key=None,
                 str server_name=None, sans=(), str min_version="1.2", bint verify=True, alpn=("http/1.1",), admit=None):
        cdef Context context = new_context(False, min_version == "1.3", False)
        protocols = protocol_list(alpn)
        self.digest = digest
        self.alpn = tuple(alpn)
        self.demands_alpn = bool(self.alpn) and "http/1.1" not in self.alpn
        self.context = context
        self.server_name = server_name
        self.sans = frozenset(sans)
        self.admit = admit
        self.verify = verify
        self.sessions = {}
        if verify:
            trust(context.ctx, list(authorities), list(revocations), False)
        SSL_CTX_set_verify(context.ctx, SSL_VERIFY_PEER if verify else SSL_VERIFY_NONE, NULL)
        if chain is not None:
            use_pair(context.ctx, chain, key)
        if protocols:
            SSL_CTX_set_alpn_protos(context.ctx, <const unsigned char*>PyBytes_AS_STRING(protocols), <unsigned int>len(protocols))
        SSL_CTX_set_session_cache_mode(context.ctx, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL)
        SSL_CTX_sess_set_new_cb(context.ctx, on_new_session)

    def adopt(self, TlsUpstream before not None) -> None:
        """Go on with the sessions of the same settings' last snapshot."""
        self.sessions = before.sessions

    def forget(self, str address not None, str host not None) -> None:
        """The endpoint is gone: its sessions are for nobody."""
        self.sessions.pop(self.session_key(address, host), None)

    cdef str session_key(self, str address, str host):
        """Under which a session is kept: a resumed one shows no certificate, so it is only for the name that was checked when it began."""
        return address if self.server_name is not None else f"{host} {address}"

    cdef Tls connect(self, int fd, str address, str host):
        """A session towards `host` (a name or an address), at the endpoint `address`."""
        cdef Tls made = new_session(self, (<Context>self.context).ctx, fd, False)
        cdef SSL* ssl = <SSL*>made.ssl
        cdef X509_VERIFY_PARAM* param = SSL_get0_param(ssl)
        cdef bytes name = (host if self.server_name is None else self.server_name).encode("ascii", "replace")
        cdef bint numeric = is_address(name)
        SSL_set_connect_state(ssl)
        made.key = self.session_key(address, host)
        if not numeric and SSL_set_tlsext_host_name(ssl, name) != 1:
            raise TlsError("the server name cannot be sent")
        if self.verify and not self.sans:
            X509_VERIFY_PARAM_set_hostflags(param, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS)
            if (X509_VERIFY_PARAM_set1_ip_asc(param, name) if numeric else X509_VERIFY_PARAM_set1_host(param, name, len(name))) != 1:
                raise TlsError("the server name cannot be checked")
        made.take_session()
        return made


cdef bint is_address(bytes name):
    try:
        ipaddress.ip_address(name.decode("ascii"))
    except ValueError:
        return False
    return True


cdef int on_new_session(SSL* ssl, SSL_SESSION* session) noexcept:
    """Keeps a session for the next connection to the same endpoint. 1: it is ours now."""
    cdef Tls tls = <Tls>SSL_get_app_data(ssl)
    cdef Session kept
    try:
        kept = Session.__new__(Session)
        sessions = (<TlsUpstream>tls.settings).sessions.setdefault(tls.key, [])
        kept.session = session
        sessions.append(kept)
        if len(sessions) > SESSIONS_KEPT:
            del sessions[0]
        return 1
    except Exception:
        if kept is not None:
            kept.session = NULL
        return 0


# -- a session --------------------------------------------------------------------------------------------------------

cdef Tls new_session(object settings, SSL_CTX* ctx, int fd, bint ktls):
    global live
    cdef Tls made = Tls.__new__(Tls)
    cdef BIO* bio
    cdef SSL* ssl
    cw_clear_errors()
    ssl = SSL_new(ctx)
    if ssl == NULL:
        raise MemoryError
    live += 1
    made.ssl = ssl
    made.settings = settings
    made.wire.fd = fd
    SSL_set_app_data(ssl, <void*>made)
    if ktls:
        SSL_set_fd(ssl, fd)                     # the kernel's records need OpenSSL's own BIO
    else:
        cw_set_wire(ssl, &made.wire)
        bio = cw_bio_new(&made.wire)
        if bio == NULL:
            raise MemoryError
        SSL_set_bio(ssl, bio, bio)
    return made


cdef enum:
    WARM = 128                  # sessions that keep OpenSSL's buffers between two records, of 34 KiB each: 4.3 MiB

# OpenSSL would free the buffers with each record and make them anew with the next (SSL_MODE_RELEASE_BUFFERS), or keep them for ever. Those that were
# used last keep them, until they rest for a tick. Borrowed references to Tls: __dealloc__ takes its own out. The place 0 is nobody's.
cdef void* keeping[WARM + 1]
cdef int turn = 0


cdef void cool(Tls tls) noexcept:
    """Gives its buffers back, unless there are bytes in them; the session comes here again with the next record.

    OpenSSL before 3.0.14 would free them under a record of which only the head is here, or a part was taken (CVE-2024-4741).
    """
    cdef SSL* ssl = <SSL*>tls.ssl
    keeping[tls.place] = NULL
    tls.place = 0
    if not SSL_has_pending(ssl) and memcmp(SSL_rstate_string(ssl), b"RH", 2) == 0:     # at the head of a record
        SSL_free_buffers(ssl)


cdef bint tls_cool() noexcept:
    cdef int i
    cdef Tls tls
    cdef bint warm = False
    for i in range(1, WARM + 1):
        if keeping[i] == NULL:
            continue
        tls = <Tls>keeping[i]
        if tls.used:
            tls.used = False
            warm = True
        else:
            cool(tls)
    return warm


cdef class Tls:
    """The TLS of one connection. Created by TlsListener.accept() and TlsUpstream.connect()."""

    def __cinit__(self):
        self.ssl = NULL
        memset(&self.wire, 0, sizeof(Wire))

    def __dealloc__(self):
        global live
        if self.place:
            keeping[self.place] = NULL
        if self.ssl != NULL:
            SSL_free(<SSL*>self.ssl)
            live -= 1

    cdef void warm(self) noexcept:
        """It is used: it may keep its buffers."""
        global turn
        self.used = True
        if self.place:
            return
        turn = turn % WARM + 1
        if keeping[turn] != NULL:
            cool(<Tls>keeping[turn])
        keeping[turn] = <void*>self
        self.place = turn

    cdef void wake(self, bint ended) noexcept:
        """An event: the kernel may have more."""
        self.wire.dry = False
        if ended:
            self.wire.ended = True

    cdef int handshake(self) except -2:
        cdef int result, error
        cw_clear_errors()
        self.warm()
        # A server's last words in a handshake are tickets, for which nobody waits: the first answer takes them along.
        self.wire.more = self.accepting and self.wire.spoken
        result = SSL_do_handshake(<SSL*>self.ssl)
        self.wire.more = False
        if result == 1:
            return self.finish()
        error = SSL_get_error(<SSL*>self.ssl, result)
        if error == SSL_ERROR_WANT_READ or error == SSL_ERROR_WANT_WRITE:
            self.push()                             # they were not the last ones
            return 0
        self.broken = True
        code = ERR_peek_error()
        if self.wire.eof or self.wire.error or code == 0:
            self.failure = FAILED_GONE
            self.reason = "the other side left"
        else:
            self.failure = FAILED_TLS
            if ERR_GET_LIB(code) == ERR_LIB_SSL and ERR_GET_REASON(code) in (SSL_R_HTTP_REQUEST, SSL_R_HTTPS_PROXY_REQUEST):
                self.failure = FAILED_PLAIN
            self.reason = self.explain()
        cw_clear_errors()
        return -1

    cdef str explain(self):
        """Why the handshake failed: the certificate's fault when there is one, else what OpenSSL says."""
        cdef long verdict = SSL_get_verify_result(<SSL*>self.ssl)
        if verdict != X509_V_OK:
            return X509_verify_cert_error_string(verdict).decode("ascii", "replace")
        return openssl_reason()

    cdef int refused(self, str why) except -2:
        self.broken = True
        self.failure = FAILED_TLS
        self.reason = why
        return -1

    cdef int finish(self) except -2:
        """After the handshake: what was agreed, and who is there."""
        cdef const unsigned char* name = NULL
        cdef unsigned int length = 0
        cdef SSL* ssl = <SSL*>self.ssl
        cdef X509* peer = SSL_get0_peer_certificate(ssl)
        cdef stack_st_X509* chain
        cdef int i
        self.resumed = SSL_session_reused(ssl)
        SSL_get0_alpn_selected(ssl, &name, &length)
        if length:
            self.alpn = <uint8_t>ALPN_IDS.get((<const char*>name)[:length], ALPN_OTHER)
        try:
            if isinstance(self.settings, TlsListener):
                if peer != NULL and (<TlsListener>self.settings).asks:
                    chain = SSL_get_peer_cert_chain(ssl)
                    self.certificate = ClientCertificate(wrap_certificate(peer), [
                        wrap_certificate(sk_X509_value(chain, i), False) for i in range(sk_X509_num(chain) if chain != NULL else 0)])
                    if (<TlsListener>self.settings).admit is not None:
                        why = (<TlsListener>self.settings).admit(self.certificate.leaf)
                        if why is not None:
                            self.refused(why)
                            if not why:
                                self.failure = FAILED_VISITOR
                            return -1
            elif (<TlsUpstream>self.settings).demands_alpn and not length:
                return self.refused(f"the server selects none of {', '.join((<TlsUpstream>self.settings).alpn)} (ALPN)")
            elif (<TlsUpstream>self.settings).verify and (<TlsUpstream>self.settings).sans:
                found = wrap_certificate(peer) if peer != NULL else None
                if found is None or not (<TlsUpstream>self.settings).sans.intersection([*found.dns, *found.uris, *found.addresses]):
                    return self.refused("the certificate carries none of the expected names")
                if (<TlsUpstream>self.settings).admit is not None:
                    self.certificate = ClientCertificate(found)
                    why = (<TlsUpstream>self.settings).admit(found)
                    if why is not None:
                        return self.refused(why)
        except TlsError as error:
            return self.refused(str(error))
        self.wire.stirred = 0
        cw_watch_messages(ssl)
        self.established = True
        return 1

    cdef void take_session(self) noexcept:
        """Offers a session of an earlier connection. A ticket of TLS 1.3 is offered once (RFC 8446 C.4)."""
        cdef Session session
        cdef long now = <long>(cw_wall_us() // 1000000)
        kept = (<TlsUpstream>self.settings).sessions.get(self.key)
        while kept:
            session = <Session>kept[len(kept) - 1]
            if not SSL_SESSION_is_resumable(session.session) or \
                    SSL_SESSION_get_time(session.session) + SSL_SESSION_get_timeout(session.session) <= now:
                kept.pop()
                continue
            SSL_set_session(<SSL*>self.ssl, session.session)
            if SSL_SESSION_get_protocol_version(session.session) >= TLS1_3_VERSION:
                kept.pop()
            return

    cdef int fail(self, int result) noexcept:
        """What a failed read or write means, as recv() and send() say it: 0 for a clean end, or -errno."""
        cdef int error = SSL_get_error(<SSL*>self.ssl, result)
        if error == SSL_ERROR_WANT_READ or error == SSL_ERROR_WANT_WRITE:
            return -EAGAIN
        if error == SSL_ERROR_ZERO_RETURN:
            return 0
        self.broken = True
        if self.wire.error:
            error = -self.wire.error
        elif self.wire.eof:
            error = -ECONNRESET                     # no close_notify: a cut stream, not an end
        else:
            error = -EPROTO
            self.reason = openssl_reason()          # an alert tells why: TLS 1.3 refuses a client after its handshake
        cw_clear_errors()
        return error

    cdef ssize_t recv(self, void* data, size_t n) noexcept:
        cdef size_t got = 0
        cdef int result, want
        if self.failed:
            return 0 if self.failed == ENDED else self.failed
        if n == 0:
            return 0
        cw_clear_errors()
        self.warm()
        self.starved = False
        while got < n:
            want = <int>(n - got if n - got < 0x40000000 else 0x40000000)
            result = SSL_read(<SSL*>self.ssl, <char*>data + got, want)
            if result > 0:
                self.wire.stirred = 0
                got += <size_t>result
                if self.at_rest():
                    break
                continue
            want = SSL_get_error(<SSL*>self.ssl, result)
            if want == SSL_ERROR_WANT_WRITE:
                self.starved = True
            result = self.fail(result)
            if got == 0:
                return result
            if result != -EAGAIN:
                self.failed = ENDED if result == 0 else result      # told by the next call
            break
        return <ssize_t>got

    cdef ssize_t send(self, const void* data, size_t n) noexcept:
        cdef size_t sent = 0
        cdef int result, want
        cw_clear_errors()
        self.warm()
        while sent < n:
            want = <int>(n - sent if n - sent < 0x40000000 else 0x40000000)
            result = SSL_write(<SSL*>self.ssl, <const char*>data + sent, want)
            if result > 0:
                sent += <size_t>result
                continue
            result = self.fail(result)
            if sent == 0:
                return result if result != 0 else -EPROTO
            break
        return <ssize_t>sent

    cdef ssize_t sendv(self, iovec* pieces, int count) noexcept:
        """Small pieces travel in one record: they are gathered; what fills records of its own is not copied."""
        cdef size_t have = 0, total = 0, at, left, take
        cdef ssize_t result
        cdef int i
        for i in range(count):
            at = 0
            while at < pieces[i].iov_len:
                left = pieces[i].iov_len - at
                if have == 0 and left >= RECORD:
                    take = left - left % RECORD
                    result = self.send(<char*>pieces[i].iov_base + at, take)
                    if result < 0:
                        return result if total == 0 else <ssize_t>total
                    total += <size_t>result
                    if <size_t>result < take:
                        return <ssize_t>total
                    at += take
                    continue
                take = RECORD - have if left > RECORD - have else left
                memcpy(gathered + have, <char*>pieces[i].iov_base + at, take)
                have += take
                at += take
                if have == RECORD or (i == count - 1 and at == pieces[i].iov_len):
                    result = self.send(gathered, have)
                    if result < 0:
                        return result if total == 0 else <ssize_t>total
                    total += <size_t>result
                    if <size_t>result < have:
                        return <ssize_t>total
                    have = 0
        return <ssize_t>total

    cdef bint silent(self) noexcept:
        """Tickets and key updates that arrived meanwhile are taken; data, an end or an error is no silence."""
        cdef char byte
        cdef int result
        if self.failed or not self.established:
            return False
        self.wire.dry = False
        cw_clear_errors()
        result = SSL_peek(<SSL*>self.ssl, &byte, 1)
        if result > 0:
            return False
        return self.fail(result) == -EAGAIN

    cdef bint at_rest(self) noexcept:
        return self.wire.dry and not self.failed and not SSL_has_pending(<SSL*>self.ssl)

    cdef void push(self) noexcept:
        if self.wire.held:
            self.wire.held = False
            cw_nodelay(self.wire.fd)                # setting it sends what is kept

    cdef void conclude(self) noexcept:
        self.wire.more = True

    cdef bint shut(self) noexcept:
        cdef int result
        if self.broken or not self.established:
            return True
        cw_clear_errors()
        self.wire.more = True
        result = SSL_shutdown(<SSL*>self.ssl)
        if result < 0 and SSL_get_error(<SSL*>self.ssl, result) == SSL_ERROR_WANT_WRITE:
            return False
        cw_clear_errors()
        self.broken = True                          # said, or impossible: either way not again
        return True

    @property
    def version(self) -> str:
        """Such as TLSv1.3."""
        return SSL_get_version(<SSL*>self.ssl).decode("ascii")

    @property
    def cipher(self) -> str:
        """The suite's name as OpenSSL writes it, such as TLS_AES_128_GCM_SHA256."""
        return SSL_get_cipher(<SSL*>self.ssl).decode("ascii")
