# One image for the gateway, the mesh's control plane, its sidecars and their interception: built in one stage, run in another
# without a compiler, as nobody in particular.
#
#   docker build -t crossway .
#   docker run --rm -p 8080:8080 -v ./edge:/etc/crossway:ro crossway
#
# The configuration is /etc/crossway/edge.yaml; its listener must bind 0.0.0.0:8080 to be reached from outside. Other commands are arguments:
#
#   docker run ... crossway mesh control -c /etc/crossway/mesh.yaml
#
# In Kubernetes the gateway and the control plane run as 65532, sidecars as 65101 (an app may be 65532, as many images are, and interception tells
# the two apart by their user), and the container that redirects as root with NET_ADMIN alone. Nothing is written below / in any of them.

FROM python:3.12-slim-bookworm AS builder
# No versions: the compiler is the base image's distribution's, and never leaves this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libnghttp2-dev libssl-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# Dependencies first: this layer is built again only when they change.
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['postgres'], *p['optional-dependencies']['pkcs11'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip wheel --no-cache-dir --wheel-dir /wheels -r /tmp/requirements.txt
COPY setup.py MANIFEST.in README.md ./
COPY _speedups _speedups
COPY gateway gateway
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="Crossway" \
      org.opencontainers.image.description="API gateway and service mesh for payment traffic" \
      org.opencontainers.image.version="0.1.0"
# What the native modules are linked with and the base image may lack; nft for `crossway mesh intercept`.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnghttp2-14 nftables \
    && rm -rf /var/lib/apt/lists/*
COPY --from=builder /wheels /wheels
RUN pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && rm -rf /wheels \
    && mkdir /var/lib/crossway \
    && chown 65532:65532 /var/lib/crossway
# Numbers, so that an orchestrator can see that it is not root.
USER 65532:65532
WORKDIR /var/lib/crossway
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 CMD ["crossway", "health"]
ENTRYPOINT ["crossway"]
CMD ["run", "-c", "/etc/crossway/edge.yaml"]
