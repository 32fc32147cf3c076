"""Reading certificates, keys, revocation lists and OCSP responses; see certificates.pxd.

Strategy: PEM goes through OpenSSL's own readers; every failure becomes a TlsError whose text names the cause and never holds
key material. Names with a NUL or a byte outside ASCII are refused, because the C world and ours would read them differently
(CVE-2025-66220). Python is called from here: while a configuration is built, and once per connection that shows a certificate.

Safety: each object owns one OpenSSL structure and frees it once; borrowed pointers (an OCSP serial) live in a structure that
the same object owns.
"""

from libc.stdint cimport int64_t
from gateway._speedups.openssl cimport *

import base64
import hashlib
import ipaddress

PEM_MAX = 1 << 20               # bytes of a PEM file; the system's CA bundle is a quarter of it


class TlsError(ValueError):
    """A certificate, key or setting that cannot be used; the text says why."""


cdef str openssl_reason():
    """What OpenSSL's error queue says, and an empty queue."""
    cdef unsigned long code = ERR_peek_error()
    cdef const char* text = ERR_reason_error_string(code) if code else NULL
    ERR_clear_error()
    return text.decode("ascii", "replace") if text != NULL else "unknown error"


cdef int no_password(char* buffer, int size, int writing, void* user) noexcept:
    return 0                    # asking on a terminal is what OpenSSL would do


cdef int64_t unix_time(const ASN1_TIME* at):
    cdef tm broken
    if at == NULL or ASN1_TIME_to_tm(at, &broken) != 1:
        ERR_clear_error()
        return 0
    return timegm(&broken)


cdef str name_text(const X509_NAME* name):
    cdef BIO* bio = BIO_new(BIO_s_mem())
    cdef char* data = NULL
    cdef long n
    if bio == NULL:
        raise MemoryError
    try:
        X509_NAME_print_ex(bio, name, 0, XN_FLAG_RFC2253 & ~ASN1_STRFLGS_ESC_MSB)
        n = BIO_get_mem_data(bio, &data)
        return data[:n].decode("utf-8", "replace")
    finally:
        BIO_free(bio)


cdef str serial_text(const ASN1_INTEGER* serial):
    cdef BIGNUM* number = ASN1_INTEGER_to_BN(serial, NULL)
    cdef char* digits
    if number == NULL:
        return ""
    digits = BN_bn2hex(number)
    BN_free(number)
    if digits == NULL:
        return ""
    text = digits.decode("ascii").lower()
    OPENSSL_free(digits)
    return text


cdef bytes der_of(X509* x509):
    cdef unsigned char* out = NULL
    cdef int n = i2d_X509(x509, &out)
    if n < 0 or out == NULL:
        raise TlsError(f"a certificate cannot be encoded: {openssl_reason()}")
    encoded = (<char*>out)[:n]
    OPENSSL_free(out)
    return encoded


cdef tuple alternative_names(X509* x509, bint strict):
    """The subject's alternative names as (dns, uris, addresses, emails)."""
    cdef GENERAL_NAMES* names = <GENERAL_NAMES*>X509_get_ext_d2i(x509, NID_subject_alt_name, NULL, NULL)
    cdef const ASN1_STRING* text
    cdef int i, kind = 0
    dns, uris, addresses, emails = [], [], [], []
    ERR_clear_error()
    if names == NULL:
        return (), (), (), ()
    try:
        for i in range(sk_GENERAL_NAME_num(names)):
            text = <const ASN1_STRING*>GENERAL_NAME_get0_value(sk_GENERAL_NAME_value(names, i), &kind)
            if kind not in (GEN_DNS, GEN_URI, GEN_IPADD, GEN_EMAIL):
                continue
            value = (<const char*>ASN1_STRING_get0_data(text))[:ASN1_STRING_length(text)]
            if kind == GEN_IPADD:
                if len(value) in (4, 16):
                    addresses.append(str(ipaddress.ip_address(value)))
                continue
            if any([byte <= 32 or byte >= 127 for byte in value]):
                if not strict:
                    continue
                raise TlsError("a name in the certificate holds a character that no name has")
            (dns if kind == GEN_DNS else uris if kind == GEN_URI else emails).append(value.decode("ascii"))
    finally:
        GENERAL_NAMES_free(names)
    return tuple(dns), tuple(uris), tuple(addresses), tuple(emails)


cdef str key_kind(const EVP_PKEY* key):
    cdef int kind = EVP_PKEY_get_base_id(key) if key != NULL else 0
    if kind == EVP_PKEY_RSA:
        return "rsa"
    if kind == EVP_PKEY_EC:
        return "ecdsa"
    return "eddsa" if kind == EVP_PKEY_ED25519 or kind == EVP_PKEY_ED448 else "other"


cdef Certificate wrap_certificate(void* x509, bint strict=True):
    """A Certificate of an X509* that stays the caller's. With `strict`, names that two readers would read differently raise
    TlsError; without, they are left out: an authority's own name decides nothing."""
    cdef Certificate made = Certificate.__new__(Certificate)
    cdef X509* own = <X509*>x509
    X509_up_ref(own)
    made.x509 = own
    made.dns, made.uris, made.addresses, made.emails = alternative_names(own, strict)
    made.subject = name_text(X509_get_subject_name(own))
    made.issuer = name_text(X509_get_issuer_name(own))
    made.serial = serial_text(X509_get0_serialNumber(own))
    made.not_before = unix_time(X509_get0_notBefore(own))
    made.not_after = unix_time(X509_get0_notAfter(own))
    made.kind = key_kind(X509_get0_pubkey(own))
    made.bits = EVP_PKEY_get_bits(X509_get0_pubkey(own)) if X509_get0_pubkey(own) != NULL else 0
    made.der = der_of(own)
    ERR_clear_error()
    return made


cdef class Certificate:
    """An X.509 certificate. Made by parse_certificates()."""

    def __dealloc__(self):
        X509_free(<X509*>self.x509)

    @property
    def thumbprint(self) -> str:
        """SHA-256 of the certificate, base64url without padding (x5t#S256)."""
        return base64.urlsafe_b64encode(hashlib.sha256(self.der).digest()).rstrip(b"=").decode("ascii")

    @property
    def pem(self) -> str:
        text = base64.b64encode(self.der).decode("ascii")
        lines = [text[at:at + 64] for at in range(0, len(text), 64)]
        return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])

    @property
    def authority(self) -> bool:
        """Whether it may sign other certificates."""
        return X509_check_ca(<X509*>self.x509) > 0

    @property
    def marked_authority(self) -> bool:
        """Whether its basic constraints call it an authority's, even if its key may not sign certificates."""
        return X509_get_extension_flags(<X509*>self.x509) & EXFLAG_CA != 0

    @property
    def key_usage(self) -> int:
        """The bits of KeyUsage as OpenSSL's KU_* (RFC 5280 4.2.1.3); -1 when the certificate does not limit it."""
        cdef unsigned int usage = X509_get_key_usage(<X509*>self.x509)
        return -1 if usage == 0xffffffffu else usage

    @property
    def extended_key_usage(self) -> int:
        """The bits of ExtendedKeyUsage as OpenSSL's XKU_*, 1 for servers and 2 for clients; -1 when it is not limited."""
        cdef unsigned int usage = X509_get_extended_key_usage(<X509*>self.x509)
        return -1 if usage == 0xffffffffu else usage

    @property
    def key_usage_critical(self) -> bool:
        """Whether who does not understand its KeyUsage must refuse it."""
        cdef int at = X509_get_ext_by_NID(<X509*>self.x509, NID_key_usage, -1)
        return at >= 0 and X509_EXTENSION_get_critical(X509_get_ext(<X509*>self.x509, at)) == 1

    def verify(self, bytes data not None, bytes signature not None) -> bool:
        """Whether `signature` over `data` is this certificate's key's: ES256 as in JWS (RFC 7518 3.4), r and s of 32 bytes each."""
        cdef EVP_PKEY* key = X509_get0_pubkey(<X509*>self.x509)
        cdef ECDSA_SIG* pair
        cdef EVP_MD_CTX* context = NULL
        cdef unsigned char* der = NULL
        cdef const unsigned char* raw = <const unsigned char*><const char*>signature
        cdef BIGNUM* r
        cdef BIGNUM* s
        cdef int n
        if len(signature) != 64 or key == NULL or EVP_PKEY_get_base_id(key) != EVP_PKEY_EC or EVP_PKEY_get_bits(key) != 256:
            return False
        pair = ECDSA_SIG_new()
        if pair == NULL:
            raise MemoryError
        try:
            r = BN_bin2bn(raw, 32, NULL)
            s = BN_bin2bn(raw + 32, 32, NULL)
            if r == NULL or s == NULL or ECDSA_SIG_set0(pair, r, s) != 1:       # which owns both from here on
                BN_free(r)
                BN_free(s)
                raise MemoryError
            n = i2d_ECDSA_SIG(pair, &der)
            context = EVP_MD_CTX_new()
            if n <= 0 or context == NULL:
                raise MemoryError
            return EVP_DigestVerifyInit(context, NULL, EVP_sha256(), NULL, key) == 1 and \
                EVP_DigestVerify(context, der, n, <const unsigned char*><const char*>data, len(data)) == 1
        finally:
            EVP_MD_CTX_free(context)
            OPENSSL_free(der)
            ECDSA_SIG_free(pair)
            ERR_clear_error()

    def __repr__(self):
        return f"<Certificate {self.subject}>"


cdef class PrivateKey:
    """A private key. Made by parse_key()."""

    def __dealloc__(self):
        EVP_PKEY_free(<EVP_PKEY*>self.key)

    def matches(self, Certificate certificate not None) -> bool:
        """Whether it is the certificate's."""
        cdef bint same = X509_check_private_key(<X509*>certificate.x509, <EVP_PKEY*>self.key) == 1
        ERR_clear_error()
        return same

    def sign(self, bytes data not None) -> bytes:
        """ES256 over `data` as in JWS: r and s of 32 bytes each. Raises TlsError for a key of another kind."""
        cdef EVP_PKEY* key = <EVP_PKEY*>self.key
        cdef unsigned char der[80]                  # a P-256 signature takes at most 72
        cdef unsigned char raw[64]
        cdef size_t n = sizeof(der)
        cdef const unsigned char* at = der
        cdef const BIGNUM* r = NULL
        cdef const BIGNUM* s = NULL
        cdef ECDSA_SIG* pair = NULL
        cdef EVP_MD_CTX* context
        if EVP_PKEY_get_base_id(key) != EVP_PKEY_EC or EVP_PKEY_get_bits(key) != 256:
            raise TlsError("ES256 needs a P-256 key")
        context = EVP_MD_CTX_new()
        try:
            if context == NULL or EVP_DigestSignInit(context, NULL, EVP_sha256(), NULL, key) != 1 or \
                    EVP_DigestSign(context, der, &n, <const unsigned char*><const char*>data, len(data)) != 1:
                raise TlsError(f"signing failed: {openssl_reason()}")
            pair = d2i_ECDSA_SIG(NULL, &at, <long>n)
            if pair == NULL:
                raise MemoryError
            ECDSA_SIG_get0(pair, &r, &s)
            if BN_bn2binpad(r, raw, 32) != 32 or BN_bn2binpad(s, raw + 32, 32) != 32:
                raise TlsError("signing failed")
            return (<char*>raw)[:64]
        finally:
            ECDSA_SIG_free(pair)
            EVP_MD_CTX_free(context)
            ERR_clear_error()


cdef class RevocationList:
    """A certificate revocation list. Made by parse_revocations()."""

    def __dealloc__(self):
        X509_CRL_free(<X509_CRL*>self.crl)


cdef class OcspResponse:
    """A stapled answer of an OCSP responder, in DER."""

    def __dealloc__(self):
        OCSP_BASICRESP_free(<OCSP_BASICRESP*>self.basic)

    def __init__(self, bytes der not None):
        cdef const unsigned char* at = <const unsigned char*><const char*>der
        cdef OCSP_RESPONSE* response = d2i_OCSP_RESPONSE(NULL, &at, len(der))
        cdef OCSP_SINGLERESP* single
        cdef ASN1_INTEGER* serial = NULL
        cdef ASN1_GENERALIZEDTIME* following = NULL
        cdef int status
        if response == NULL:
            ERR_clear_error()
            raise TlsError("not an OCSP response in DER")
        try:
            if OCSP_response_status(response) != OCSP_RESPONSE_STATUS_SUCCESSFUL:
                raise TlsError("the OCSP responder answered with an error")
            self.basic = OCSP_response_get1_basic(response)
        finally:
            OCSP_RESPONSE_free(response)
        if self.basic == NULL or OCSP_resp_count(<OCSP_BASICRESP*>self.basic) != 1:
            ERR_clear_error()
            raise TlsError("the OCSP response is not about one certificate")
        single = OCSP_resp_get0(<OCSP_BASICRESP*>self.basic, 0)
        status = OCSP_single_get0_status(single, NULL, NULL, NULL, &following)
        OCSP_id_get0_info(NULL, NULL, NULL, &serial, <OCSP_CERTID*>OCSP_SINGLERESP_get0_id(single))
        self.serial = serial
        self.status = "good" if status == 0 else "revoked" if status == 1 else "unknown"
        self.next_update = unix_time(<const ASN1_TIME*>following)
        self.der = der

    cpdef bint answers(self, Certificate certificate):
        """Whether it is about this certificate (by its serial number)."""
        return self.serial != NULL and \
            ASN1_INTEGER_cmp(<ASN1_INTEGER*>self.serial, X509_get0_serialNumber(<X509*>certificate.x509)) == 0


cdef class ClientCertificate:
    """The certificate that a client proved to hold the key of, verified against the listener's `client_ca`."""

    def __init__(self, Certificate leaf not None, others=()):
        self.leaf = leaf
        self.others = tuple(others)
        self.thumbprint = leaf.thumbprint

    @property
    def subject(self) -> str:
        """The subject's distinguished name, RFC 4514."""
        return self.leaf.subject

    @property
    def issuer(self) -> str:
        return self.leaf.issuer

    @property
    def serial(self) -> str:
        return self.leaf.serial

    @property
    def dns(self) -> tuple:
        """DNS names among the subject's alternative names."""
        return self.leaf.dns

    @property
    def uris(self) -> tuple:
        """URIs among them, such as SPIFFE ids."""
        return self.leaf.uris

    @property
    def not_after(self) -> int:
        """Unix seconds."""
        return self.leaf.not_after

    @property
    def pem(self) -> str:
        """The certificate, and behind it what the client sent of its chain."""
        return "".join([self.leaf.pem, *[other.pem for other in self.others]])

    cdef bytes fields(self):
        """RFC 9440 2.2 and 2.3: byte sequences of structured fields."""
        if self._fields is None:
            lines = b"client-cert: :" + base64.b64encode(self.leaf.der) + b":\r\n"
            if self.others:
                chain = b", ".join([b":" + base64.b64encode(other.der) + b":" for other in self.others])
                lines += b"client-cert-chain: " + chain + b"\r\n"
            self._fields = lines
        return self._fields

    def __repr__(self):
        return f"<ClientCertificate {self.subject}>"


# -- files ------------------------------------------------------------------------------------------------------------

cdef BIO* memory_of(bytes text) except NULL:
    cdef BIO* bio
    if len(text) > PEM_MAX:
        raise TlsError(f"larger than {PEM_MAX >> 20} MiB")
    ERR_clear_error()
    bio = BIO_new_mem_buf(<const char*>text, <int>len(text))
    if bio == NULL:
        raise MemoryError
    return bio


cdef bint ended_well():
    """Whether the queue says no more than that there was no further PEM block."""
    cdef unsigned long code = ERR_peek_last_error()
    cdef bint well = code == 0 or (ERR_GET_LIB(code) == ERR_LIB_PEM and ERR_GET_REASON(code) == PEM_R_NO_START_LINE)
    if well:
        ERR_clear_error()
    return well


def parse_certificates(bytes pem not None, bint strict=True) -> list:
    """The certificates in a PEM text, in their order. Raises TlsError when there is none or one is broken."""
    cdef BIO* bio = memory_of(pem)
    cdef X509* found
    certificates = []
    try:
        while True:
            found = PEM_read_bio_X509(bio, NULL, NULL, NULL)
            if found == NULL:
                break
            try:
                certificates.append(wrap_certificate(found, strict))
            finally:
                X509_free(found)
        if not ended_well():
            raise TlsError(f"a certificate in it is broken: {openssl_reason()}")
    finally:
        BIO_free(bio)
    if not certificates:
        raise TlsError("no certificate in it (PEM: -----BEGIN CERTIFICATE-----)")
    return certificates


def chain_fault(list chain not None, list authorities not None, long long at=0) -> str | None:
    """Why the certificate chain[0] does not lead, over the others, to one of `authorities` now, or at a unix time; None when it does."""
    cdef Certificate each
    cdef X509_STORE* store = X509_STORE_new()
    cdef X509_STORE_CTX* context = X509_STORE_CTX_new()
    cdef stack_st_X509* others = sk_X509_new_null()
    cdef int error
    try:
        if store == NULL or context == NULL or others == NULL:
            raise MemoryError
        for each in authorities:
            if X509_STORE_add_cert(store, <X509*>each.x509) != 1:
                raise MemoryError
        for each in chain[1:]:
            if sk_X509_push(others, <X509*>each.x509) <= 0:     # borrowed: `chain` keeps it
                raise MemoryError
        each = chain[0]
        if X509_STORE_CTX_init(context, store, <X509*>each.x509, others) != 1:
            raise MemoryError
        if at:
            X509_STORE_CTX_set_time(context, 0, at)
        if X509_verify_cert(context) == 1:
            return None
        error = X509_STORE_CTX_get_error(context)
        return X509_verify_cert_error_string(error).decode("ascii", "replace")
    finally:
        X509_STORE_CTX_free(context)
        sk_X509_free(others)
        X509_STORE_free(store)
        ERR_clear_error()


def parse_key(bytes pem not None) -> PrivateKey:
    """The private key in a PEM text. Raises TlsError when there is none, it is encrypted, or broken."""
    cdef BIO* bio
    cdef PrivateKey made = PrivateKey.__new__(PrivateKey)
    if b"ENCRYPTED" in pem:
        raise TlsError("the key is encrypted: nobody is there to type its password")
    if b"PRIVATE KEY-----" not in pem:
        raise TlsError("no private key in it (PEM: -----BEGIN PRIVATE KEY-----)")
    bio = memory_of(pem)
    try:
        made.key = PEM_read_bio_PrivateKey(bio, NULL, no_password, NULL)
        if made.key == NULL:
            raise TlsError(f"the key in it is broken: {openssl_reason()}")
    finally:
        BIO_free(bio)
    made.kind = key_kind(<EVP_PKEY*>made.key)
    ERR_clear_error()
    return made


def parse_revocations(bytes pem not None) -> list:
    """The revocation lists in a PEM text. Raises TlsError when there is none or one is broken."""
    cdef BIO* bio = memory_of(pem)
    cdef X509_CRL* found
    cdef RevocationList made
    lists = []
    try:
        while True:
            found = PEM_read_bio_X509_CRL(bio, NULL, NULL, NULL)
            if found == NULL:
                break
            made = RevocationList.__new__(RevocationList)
            made.crl = found
            made.issuer = name_text(X509_CRL_get_issuer(found))
            made.next_update = unix_time(X509_CRL_get0_nextUpdate(found))
            lists.append(made)
        if not ended_well():
            raise TlsError(f"a revocation list in it is broken: {openssl_reason()}")
    finally:
        BIO_free(bio)
    if not lists:
        raise TlsError("no revocation list in it (PEM: -----BEGIN X509 CRL-----)")
    return lists
