"""Certificates, keys, revocation lists and OCSP responses as objects.

Strategy: parsed once by OpenSSL and kept as its own structures; what people and policies ask for are attributes made when the
object is. Python is called from here: while a configuration is built, and once per connection that shows a certificate.
"""

from libc.stdint cimport int64_t

cdef class Certificate:
    cdef void* x509                     # X509*, owned
    cdef readonly str subject, issuer   # RFC 4514
    cdef readonly str serial            # hexadecimal
    cdef readonly int64_t not_before, not_after     # unix seconds
    cdef readonly tuple dns, uris, addresses, emails
    cdef readonly str kind              # rsa, ecdsa, eddsa or other
    cdef readonly int bits
    cdef readonly bytes der

cdef class PrivateKey:
    cdef void* key                      # EVP_PKEY*, owned
    cdef readonly str kind

cdef class RevocationList:
    cdef void* crl                      # X509_CRL*, owned
    cdef readonly str issuer
    cdef readonly int64_t next_update   # unix seconds; 0: it names none

cdef class OcspResponse:
    cdef void* serial                   # ASN1_INTEGER*, borrowed from `basic`
    cdef void* basic                    # OCSP_BASICRESP*, owned
    cdef readonly bytes der
    cdef readonly int64_t next_update
    cdef readonly str status            # good, revoked or unknown
    cpdef bint answers(self, Certificate certificate)

# What a client showed, and who vouched for it. Made once per connection.
cdef class ClientCertificate:
    cdef readonly Certificate leaf
    cdef readonly tuple others          # Certificate: what the client sent behind its own
    cdef readonly str thumbprint        # SHA-256, base64url without padding, as in x5t#S256 (RFC 8705)
    cdef bytes _fields                  # RFC 9440 lines, made when they are first needed
    cdef object caller                  # what `caller_by` made of it: a connection's certificate is looked up once, not per request
    cdef object caller_by
    cdef bytes fields(self)

cdef Certificate wrap_certificate(void* x509, bint strict=*)
cdef str openssl_reason()
