# The tool service: untrusted Python in an OS sandbox. Built from the root of the repository:
#
#   docker build -f dockerfiles/tool.Dockerfile -t openrlhf-alp/tool .
#
# BASE is any image with Python 3.11, its module venv and libseccomp.so.2, for example one pinned by
# digest. README.md beside this file tells of mirrors, certificates and how to run it.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# BASE is the builder's choice and carries a tag in its default.
# hadolint ignore=DL3006
FROM ${BASE} AS build
SHELL ["/bin/sh", "-eu", "-c"]
# Versions of Debian's packages follow from the one of BASE.
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends binutils; \
    rm -rf /var/lib/apt/lists/*; \
    python3.11 -m venv /usr/local/openrlhf-alp
WORKDIR /src
COPY setup.py README.md requirements/cpu.lock ./
# What it stands on comes before the source, so that a change of the source builds in seconds. The
# secrets are optional: pip's configuration (a mirror) and a certificate; neither stays in a layer.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    /usr/local/openrlhf-alp/bin/pip install --quiet --constraint cpu.lock '.[tool]' setuptools wheel
# Of the bill of materials only the result goes into the image.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python3.11 -m venv /sbom && /sbom/bin/pip install --quiet cyclonedx-bom==7.5.0
COPY services services
COPY openrlhf_alp openrlhf_alp
# Programs need neither the test suites of the libraries nor pip, and nobody debugs extension modules.
# Libraries in *.libs stay as they are: their sections were moved, and strip damages such files.
RUN /usr/local/openrlhf-alp/bin/pip install --quiet --no-deps --no-index --no-build-isolation \
        --force-reinstall . ; \
    /usr/local/openrlhf-alp/bin/pip uninstall --quiet --yes setuptools wheel pip; \
    find /usr/local/openrlhf-alp -depth -type d -name tests -exec rm -r {} + ; \
    find /usr/local/openrlhf-alp -name '*.so' -not -path '*.libs/*' -exec strip --strip-unneeded {} + ; \
    /sbom/bin/cyclonedx-py environment --output-reproducible \
        --output-file /usr/local/openrlhf-alp/sbom.cdx.json /usr/local/openrlhf-alp/bin/python

# hadolint ignore=DL3006
FROM ${BASE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="openrlhf-alp tool service" \
      org.opencontainers.image.description="Untrusted Python in an OS sandbox, over REST, sessions, MCP and SandboxFusion's contract" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 1000 alp && useradd --uid 1000 --gid 1000 --create-home alp
COPY --from=build /usr/local/openrlhf-alp /usr/local/openrlhf-alp
COPY dockerfiles/probe.py /usr/local/openrlhf-alp/probe.py
ENV PATH=/usr/local/openrlhf-alp/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    OPENRLHF_ALP_TOOL_HOST=0.0.0.0 \
    OPENRLHF_ALP_TOOL_PORT=8090
USER 1000:1000
WORKDIR /home/alp
EXPOSE 8090
HEALTHCHECK --interval=5s --timeout=20s --start-period=60s --retries=3 \
    CMD ["python", "/usr/local/openrlhf-alp/probe.py", "8090"]
ENTRYPOINT ["python", "-m", "services.tool"]
