"""The C declarations of OpenSSL 3 that the gateway uses, in one place.

Strategy: thin; included by the two modules that are linked against it (certificates, tls), and by nobody else: the other
modules see their classes, whose fields are plain pointers. Python is called from here: never.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.time cimport time_t

cdef extern from "openssl/ssl.h":
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct SSL_SESSION:
        pass
    ctypedef struct SSL_METHOD:
        pass
    int SSL_ERROR_NONE, SSL_ERROR_WANT_READ, SSL_ERROR_WANT_WRITE, SSL_ERROR_ZERO_RETURN, SSL_ERROR_SYSCALL, SSL_ERROR_SSL
    int SSL_VERIFY_NONE, SSL_VERIFY_PEER, SSL_VERIFY_FAIL_IF_NO_PEER_CERT
    int SSL_TLSEXT_ERR_OK, SSL_TLSEXT_ERR_ALERT_FATAL, SSL_TLSEXT_ERR_NOACK
    int TLSEXT_NAMETYPE_host_name, TLSEXT_STATUSTYPE_ocsp
    int TLS1_2_VERSION, TLS1_3_VERSION
    int SSL_SESS_CACHE_OFF, SSL_SESS_CACHE_CLIENT, SSL_SESS_CACHE_NO_INTERNAL
    uint64_t SSL_OP_NO_COMPRESSION, SSL_OP_NO_RENEGOTIATION, SSL_OP_CIPHER_SERVER_PREFERENCE, SSL_OP_PRIORITIZE_CHACHA
    uint64_t SSL_OP_NO_TICKET, SSL_OP_ENABLE_KTLS
    long SSL_MODE_ENABLE_PARTIAL_WRITE, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, SSL_MODE_NO_AUTO_CHAIN
    int SSL_BUILD_CHAIN_FLAG_IGNORE_ERROR
    int SSL_R_UNEXPECTED_EOF_WHILE_READING, SSL_R_HTTP_REQUEST, SSL_R_HTTPS_PROXY_REQUEST
    const SSL_METHOD* TLS_server_method()
    const SSL_METHOD* TLS_client_method()
    SSL_CTX* SSL_CTX_new(const SSL_METHOD* method)
    void SSL_CTX_free(SSL_CTX* context)
    int SSL_CTX_set_min_proto_version(SSL_CTX* context, int version)
    int SSL_CTX_set_cipher_list(SSL_CTX* context, const char* text)
    int SSL_CTX_set_ciphersuites(SSL_CTX* context, const char* text)
    int SSL_CTX_set1_groups_list(SSL_CTX* context, const char* text)
    uint64_t SSL_CTX_set_options(SSL_CTX* context, uint64_t options)
    long SSL_CTX_set_mode(SSL_CTX* context, long mode)
    long SSL_CTX_set_read_ahead(SSL_CTX* context, long on)
    void SSL_CTX_set_security_level(SSL_CTX* context, int level)
    long SSL_CTX_set_max_cert_list(SSL_CTX* context, long size)
    void SSL_CTX_set_verify(SSL_CTX* context, int mode, void* callback)
    void SSL_CTX_set_verify_depth(SSL_CTX* context, int depth)
    int SSL_CTX_set_session_id_context(SSL_CTX* context, const unsigned char* name, unsigned int length)
    long SSL_CTX_set_session_cache_mode(SSL_CTX* context, long mode)
    long SSL_CTX_set_timeout(SSL_CTX* context, long seconds)
    int SSL_CTX_set_num_tickets(SSL_CTX* context, size_t count)
    int SSL_CTX_use_certificate(SSL_CTX* context, X509* certificate)
    int SSL_CTX_use_PrivateKey(SSL_CTX* context, EVP_PKEY* key)
    int SSL_CTX_check_private_key(SSL_CTX* context)
    long SSL_CTX_add1_chain_cert(SSL_CTX* context, X509* certificate)
    int SSL_CTX_build_cert_chain(SSL_CTX* context, int flags)
    int SSL_CTX_add_client_CA(SSL_CTX* context, X509* certificate)
    X509_STORE* SSL_CTX_get_cert_store(SSL_CTX* context)
    int SSL_CTX_set_tlsext_servername_callback(SSL_CTX* context, int (*callback)(SSL*, int*, void*) noexcept)
    int SSL_CTX_set_tlsext_servername_arg(SSL_CTX* context, void* argument)
    long SSL_CTX_set_tlsext_status_cb(SSL_CTX* context, int (*callback)(SSL*, void*) noexcept)
    long SSL_CTX_set_tlsext_status_arg(SSL_CTX* context, void* argument)
    void SSL_CTX_set_alpn_select_cb(SSL_CTX* context, int (*callback)(SSL*, const unsigned char**, unsigned char*,
                                    const unsigned char*, unsigned int, void*) noexcept, void* argument)
    int SSL_CTX_set_alpn_protos(SSL_CTX* context, const unsigned char* list, unsigned int length)
    void SSL_CTX_sess_set_new_cb(SSL_CTX* context, int (*callback)(SSL*, SSL_SESSION*) noexcept)
    int SSL_select_next_proto(unsigned char** out, unsigned char* length, const unsigned char* ours, unsigned int our_length,
                              const unsigned char* theirs, unsigned int their_length)
    int OPENSSL_NPN_NEGOTIATED
    SSL* SSL_new(SSL_CTX* context)
    void SSL_free(SSL* ssl)
    int SSL_set_fd(SSL* ssl, int fd)
    int SSL_free_buffers(SSL* ssl)
    const char* SSL_rstate_string(SSL* ssl)
    void SSL_set_bio(SSL* ssl, BIO* reading, BIO* writing)
    void SSL_set_accept_state(SSL* ssl)
    void SSL_set_connect_state(SSL* ssl)
    int SSL_set_app_data(SSL* ssl, void* data)
    void* SSL_get_app_data(SSL* ssl)
    SSL_CTX* SSL_set_SSL_CTX(SSL* ssl, SSL_CTX* context)
    int SSL_do_handshake(SSL* ssl)
    int SSL_read(SSL* ssl, void* data, int n)
    int SSL_peek(SSL* ssl, void* data, int n)
    int SSL_write(SSL* ssl, const void* data, int n)
    int SSL_shutdown(SSL* ssl)
    int SSL_get_error(SSL* ssl, int result)
    bint SSL_has_pending(SSL* ssl)
    bint SSL_session_reused(SSL* ssl)
    const char* SSL_get_cipher(const SSL* ssl)
    const char* SSL_get_version(SSL* ssl)
    const char* SSL_get_servername(SSL* ssl, int kind)
    int SSL_set_tlsext_host_name(SSL* ssl, const char* name)
    X509_VERIFY_PARAM* SSL_get0_param(SSL* ssl)
    long SSL_get_verify_result(SSL* ssl)
    X509* SSL_get0_peer_certificate(SSL* ssl)
    stack_st_X509* SSL_get_peer_cert_chain(SSL* ssl)
    X509* SSL_get_certificate(SSL* ssl)
    void SSL_get0_alpn_selected(SSL* ssl, const unsigned char** name, unsigned int* length)
    long SSL_set_tlsext_status_ocsp_resp(SSL* ssl, unsigned char* response, long length)
    int SSL_set_session(SSL* ssl, SSL_SESSION* session)
    int SSL_SESSION_get_protocol_version(SSL_SESSION* session)
    bint SSL_SESSION_is_resumable(SSL_SESSION* session)
    long SSL_SESSION_get_time(SSL_SESSION* session)
    long SSL_SESSION_get_timeout(SSL_SESSION* session)
    void SSL_SESSION_free(SSL_SESSION* session)

cdef extern from "openssl/err.h":
    void ERR_clear_error()
    unsigned long ERR_peek_error()
    unsigned long ERR_peek_last_error()
    const char* ERR_reason_error_string(unsigned long code)
    int ERR_GET_REASON(unsigned long code)
    int ERR_GET_LIB(unsigned long code)
    int ERR_LIB_SSL, ERR_LIB_PEM, PEM_R_NO_START_LINE

cdef extern from "openssl/bio.h":
    ctypedef struct BIO:
        pass
    BIO* BIO_new_mem_buf(const void* data, int n)
    BIO* BIO_new(const void* method)
    const void* BIO_s_mem()
    int BIO_free(BIO* bio)
    long BIO_get_mem_data(BIO* bio, char** data)

cdef extern from "openssl/evp.h":
    ctypedef struct EVP_PKEY:
        pass
    void EVP_PKEY_free(EVP_PKEY* key)
    int EVP_PKEY_get_base_id(const EVP_PKEY* key)
    int EVP_PKEY_get_bits(const EVP_PKEY* key)
    int EVP_PKEY_RSA, EVP_PKEY_EC, EVP_PKEY_ED25519, EVP_PKEY_ED448

cdef extern from "openssl/pem.h":
    X509* PEM_read_bio_X509(BIO* bio, X509** out, void* callback, void* user)
    X509_CRL* PEM_read_bio_X509_CRL(BIO* bio, X509_CRL** out, void* callback, void* user)
    EVP_PKEY* PEM_read_bio_PrivateKey(BIO* bio, EVP_PKEY** out, int (*callback)(char*, int, int, void*) noexcept, void* user)
    int PEM_write_bio_X509(BIO* bio, X509* certificate)

cdef extern from "openssl/x509v3.h":
    ctypedef struct X509:
        pass
    ctypedef struct X509_CRL:
        pass
    ctypedef struct X509_NAME:
        pass
    ctypedef struct X509_STORE:
        pass
    ctypedef struct X509_VERIFY_PARAM:
        pass
    ctypedef struct ASN1_TIME:
        pass
    ctypedef struct ASN1_INTEGER:
        pass
    ctypedef struct ASN1_STRING:
        pass
    cdef struct stack_st_X509:
        pass
    ctypedef struct GENERAL_NAMES:
        pass
    ctypedef struct GENERAL_NAME:
        pass
    int GEN_DNS, GEN_URI, GEN_IPADD, GEN_EMAIL, NID_subject_alt_name, NID_key_usage, X509_V_OK
    unsigned long X509_V_FLAG_CRL_CHECK, X509_V_FLAG_CRL_CHECK_ALL
    unsigned int X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS
    unsigned long XN_FLAG_RFC2253, ASN1_STRFLGS_ESC_MSB
    int X509_up_ref(X509* certificate)
    void X509_free(X509* certificate)
    int X509_cmp(const X509* a, const X509* b)
    int i2d_X509(X509* certificate, unsigned char** out)
    X509_NAME* X509_get_subject_name(const X509* certificate)
    X509_NAME* X509_get_issuer_name(const X509* certificate)
    int X509_NAME_print_ex(BIO* bio, const X509_NAME* name, int indent, unsigned long flags)
    int X509_NAME_cmp(const X509_NAME* a, const X509_NAME* b)
    const ASN1_TIME* X509_get0_notBefore(const X509* certificate)
    const ASN1_TIME* X509_get0_notAfter(const X509* certificate)
    const ASN1_INTEGER* X509_get0_serialNumber(const X509* certificate)
    EVP_PKEY* X509_get0_pubkey(const X509* certificate)
    int X509_check_private_key(const X509* certificate, const EVP_PKEY* key)
    int X509_check_ca(X509* certificate)
    unsigned int X509_get_key_usage(X509* certificate)
    unsigned int X509_get_extension_flags(X509* certificate)
    int EXFLAG_CA
    unsigned int X509_get_extended_key_usage(X509* certificate)
    ctypedef struct X509_EXTENSION:
        pass
    ctypedef struct X509_STORE_CTX:
        pass
    int X509_get_ext_by_NID(const X509* certificate, int nid, int last)
    X509_EXTENSION* X509_get_ext(const X509* certificate, int index)
    int X509_EXTENSION_get_critical(const X509_EXTENSION* extension)
    stack_st_X509* sk_X509_new_null()
    int sk_X509_push(stack_st_X509* chain, X509* certificate)
    void sk_X509_free(stack_st_X509* chain)
    X509_STORE* X509_STORE_new()
    void X509_STORE_free(X509_STORE* store)
    X509_STORE_CTX* X509_STORE_CTX_new()
    void X509_STORE_CTX_free(X509_STORE_CTX* context)
    int X509_STORE_CTX_init(X509_STORE_CTX* context, X509_STORE* store, X509* leaf, stack_st_X509* chain)
    void X509_STORE_CTX_set_time(X509_STORE_CTX* context, unsigned long flags, time_t t)
    int X509_verify_cert(X509_STORE_CTX* context)
    int X509_STORE_CTX_get_error(X509_STORE_CTX* context)
    void* X509_get_ext_d2i(const X509* certificate, int nid, int* critical, int* index)
    int sk_GENERAL_NAME_num(const GENERAL_NAMES* names)
    GENERAL_NAME* sk_GENERAL_NAME_value(const GENERAL_NAMES* names, int index)
    void GENERAL_NAMES_free(GENERAL_NAMES* names)
    void* GENERAL_NAME_get0_value(const GENERAL_NAME* name, int* kind)
    const unsigned char* ASN1_STRING_get0_data(const ASN1_STRING* text)
    int ASN1_STRING_length(const ASN1_STRING* text)
    int sk_X509_num(const stack_st_X509* chain)
    X509* sk_X509_value(const stack_st_X509* chain, int index)
    int X509_STORE_add_cert(X509_STORE* store, X509* certificate)
    int X509_STORE_add_crl(X509_STORE* store, X509_CRL* crl)
    int X509_STORE_set_flags(X509_STORE* store, unsigned long flags)
    int X509_VERIFY_PARAM_set1_host(X509_VERIFY_PARAM* param, const char* name, size_t length)
    int X509_VERIFY_PARAM_set1_ip_asc(X509_VERIFY_PARAM* param, const char* address)
    void X509_VERIFY_PARAM_set_hostflags(X509_VERIFY_PARAM* param, unsigned int flags)
    const char* X509_verify_cert_error_string(long code)
    void X509_CRL_free(X509_CRL* crl)
    X509_NAME* X509_CRL_get_issuer(const X509_CRL* crl)
    const ASN1_TIME* X509_CRL_get0_nextUpdate(const X509_CRL* crl)

cdef extern from "openssl/ocsp.h":
    ctypedef struct OCSP_RESPONSE:
        pass
    ctypedef struct OCSP_BASICRESP:
        pass
    ctypedef struct OCSP_SINGLERESP:
        pass
    ctypedef struct OCSP_CERTID:
        pass
    ctypedef struct ASN1_GENERALIZEDTIME:
        pass
    int OCSP_RESPONSE_STATUS_SUCCESSFUL
    OCSP_RESPONSE* d2i_OCSP_RESPONSE(OCSP_RESPONSE** out, const unsigned char** data, long n)
    void OCSP_RESPONSE_free(OCSP_RESPONSE* response)
    int OCSP_response_status(OCSP_RESPONSE* response)
    OCSP_BASICRESP* OCSP_response_get1_basic(OCSP_RESPONSE* response)
    void OCSP_BASICRESP_free(OCSP_BASICRESP* basic)
    int OCSP_resp_count(OCSP_BASICRESP* basic)
    OCSP_SINGLERESP* OCSP_resp_get0(OCSP_BASICRESP* basic, int index)
    const OCSP_CERTID* OCSP_SINGLERESP_get0_id(const OCSP_SINGLERESP* single)
    int OCSP_single_get0_status(OCSP_SINGLERESP* single, int* reason, ASN1_GENERALIZEDTIME** revoked,
                                ASN1_GENERALIZEDTIME** this_update, ASN1_GENERALIZEDTIME** next_update)
    int OCSP_id_get0_info(void* name_hash, void* algorithm, void* key_hash, ASN1_INTEGER** serial, OCSP_CERTID* id)

cdef extern from "openssl/asn1.h":
    int ASN1_TIME_to_tm(const ASN1_TIME* at, tm* out)
    int ASN1_INTEGER_cmp(const ASN1_INTEGER* a, const ASN1_INTEGER* b)

cdef extern from "openssl/bn.h":
    ctypedef struct BIGNUM:
        pass
    BIGNUM* ASN1_INTEGER_to_BN(const ASN1_INTEGER* number, BIGNUM* out)
    int BN_bn2binpad(const BIGNUM* number, unsigned char* out, int n)
    BIGNUM* BN_bin2bn(const unsigned char* data, int n, BIGNUM* out)
    char* BN_bn2hex(const BIGNUM* number)
    void BN_free(BIGNUM* number)

cdef extern from "openssl/ecdsa.h":
    ctypedef struct ECDSA_SIG:
        pass
    ECDSA_SIG* ECDSA_SIG_new()
    void ECDSA_SIG_free(ECDSA_SIG* signature)
    int ECDSA_SIG_set0(ECDSA_SIG* signature, BIGNUM* r, BIGNUM* s)
    ECDSA_SIG* d2i_ECDSA_SIG(ECDSA_SIG** out, const unsigned char** data, long n)
    void ECDSA_SIG_get0(const ECDSA_SIG* signature, const BIGNUM** r, const BIGNUM** s)
    int i2d_ECDSA_SIG(const ECDSA_SIG* signature, unsigned char** out)

cdef extern from "openssl/evp.h":
    ctypedef struct EVP_MD:
        pass
    ctypedef struct EVP_MD_CTX:
        pass
    const EVP_MD* EVP_sha256()
    EVP_MD_CTX* EVP_MD_CTX_new()
    void EVP_MD_CTX_free(EVP_MD_CTX* context)
    int EVP_DigestSignInit(EVP_MD_CTX* context, void* key_context, const EVP_MD* digest, void* engine, EVP_PKEY* key)
    int EVP_DigestSign(EVP_MD_CTX* context, unsigned char* out, size_t* out_n, const unsigned char* data, size_t n)
    int EVP_DigestVerifyInit(EVP_MD_CTX* context, void* key_context, const EVP_MD* digest, void* engine, EVP_PKEY* key)
    int EVP_DigestVerify(EVP_MD_CTX* context, const unsigned char* signature, size_t signature_n, const unsigned char* data,
                         size_t n)

cdef extern from "openssl/crypto.h":
    void* OPENSSL_memdup(const void* data, size_t n)
    void OPENSSL_free(void* data)

cdef extern from "time.h":
    cdef struct tm:
        pass
    int64_t timegm(tm* at)
