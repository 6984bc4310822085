# The rollout service and the learner, as two targets on one installation. Built from the root of the
# repository:
#
#   docker build -f dockerfiles/stack.Dockerfile --target rollout -t openrlhf-alp/rollout .
#   docker build -f dockerfiles/stack.Dockerfile --target learner -t openrlhf-alp/learner .
#
# For GPUs: --build-arg FLAVOUR=gpu --build-arg BASE=an image with Python 3.11 and CUDA's compiler.
# BASE is any image with Python 3.11.5 or later and its module venv. See README.md beside this file.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG FLAVOUR=cpu

# hadolint ignore=DL3006
FROM ${BASE} AS base
SHELL ["/bin/sh", "-eu", "-c"]
# g++ and Python's headers compile what torch fuses at run time, also in vLLM, whose worker ends at
# its first request without them; Debian's Python has its headers in a package of their own. libnuma1
# is what vLLM's CPU kernels load. Versions of Debian's packages follow from the one of BASE.
# hadolint ignore=DL3008
RUN headers=$(python3.11 -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
    apt-get update -qq; \
    apt-get install -y -qq --no-install-recommends g++ libnuma1; \
    [ -e "$headers/Python.h" ] || \
        apt-get install -y -qq --no-install-recommends python3.11-dev; \
    rm -rf /var/lib/apt/lists/*; \
    groupadd --gid 1000 alp && useradd --uid 1000 --gid 1000 --create-home alp; \
    install -d -o 1000 -g 1000 /models /runs /weights
ENV PATH=/usr/local/openrlhf-alp/bin:$PATH

FROM base AS install-cpu
WORKDIR /src
COPY requirements/cpu.lock ./
RUN python3.11 -m venv /usr/local/openrlhf-alp
ARG TORCH_INDEX=""
# An index of CPU builds; without one, an index may serve a torch that brings CUDA's libraries. The
# versions are those of the lock.
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    pip install --quiet --constraint cpu.lock ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        "$(grep '^torch==' cpu.lock)" "$(grep '^setuptools==' cpu.lock)"
# The lock is whole, and some packages in it name requirements that only CUDA has.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    pip install --quiet --no-deps --requirement cpu.lock
# Another vLLM, with what it needs newer than the lock has it: requirements/vllm-VERSION.txt. Only the
# rollout service can be that new; the learner's pins are OpenRLHF's.
ARG VLLM=""
COPY requirements/vllm-*.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    [ -z "$VLLM" ] || pip install --quiet --no-deps --requirement "vllm-$VLLM.txt"

FROM base AS install-gpu
WORKDIR /src
COPY setup.py README.md ./
RUN python3.11 -m venv /usr/local/openrlhf-alp
# The extras pin what has to be the same everywhere, which are OpenRLHF's own pins. vLLM, which brings
# torch, comes first: the build of OpenRLHF's flash-attn imports torch, and must find this one.
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    pip install --quiet '.[rollout]' 'setuptools<81' wheel packaging ninja psutil; \
    pip install --quiet --no-build-isolation '.[learner,rollout,demo]'

# hadolint ignore=DL3006
FROM install-${FLAVOUR} AS dependencies

FROM dependencies AS package
WORKDIR /src
# Of the bill of materials only the result goes into the image.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python3.11 -m venv /sbom && /sbom/bin/pip install --quiet cyclonedx-bom==7.5.0
COPY setup.py README.md ./
COPY services services
COPY openrlhf_alp openrlhf_alp
RUN pip install --quiet --no-cache-dir --no-deps --no-index --no-build-isolation --ignore-installed \
        --prefix /package . ; \
    cp -r /package/. /usr/local/openrlhf-alp; \
    /sbom/bin/cyclonedx-py environment --output-reproducible \
        --output-file /package/sbom.cdx.json /usr/local/openrlhf-alp/bin/python

FROM base AS runtime
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Two layers: a change of the source leaves the one of 4 GB as it is.
COPY --from=dependencies /usr/local/openrlhf-alp /usr/local/openrlhf-alp
COPY --from=package /package /usr/local/openrlhf-alp
COPY dockerfiles/probe.py /usr/local/openrlhf-alp/probe.py
# Caches go where a container with a read-only root has a temporary file system.
ENV PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/models \
    HF_HOME=/models/huggingface \
    VLLM_CACHE_ROOT=/tmp/vllm \
    VLLM_NO_USAGE_STATS=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton \
    MPLCONFIGDIR=/tmp/matplotlib \
    HOME=/tmp
USER 1000:1000
WORKDIR /runs

FROM runtime AS rollout
LABEL org.opencontainers.image.title="openrlhf-alp rollout service" \
      org.opencontainers.image.description="vLLM with exact log-probabilities and verified weight versions"
ENV OPENRLHF_ALP_ROLLOUT_HOST=0.0.0.0 \
    OPENRLHF_ALP_ROLLOUT_PORT=8000
EXPOSE 8000
# A large model takes minutes to load; the clients wait as long. On a busy machine the probe's own
# Python takes seconds to start.
HEALTHCHECK --interval=5s --timeout=20s --start-period=600s --retries=3 \
    CMD ["python", "/usr/local/openrlhf-alp/probe.py", "8000"]
ENTRYPOINT ["python", "-m", "services.rollout"]

FROM runtime AS learner
LABEL org.opencontainers.image.title="openrlhf-alp learner" \
      org.opencontainers.image.description="Adaptive Layerwise Perturbation on OpenRLHF, Ray and DeepSpeed"
COPY recipes /usr/local/openrlhf-alp/recipes
COPY dockerfiles/discover.py /usr/local/openrlhf-alp/discover.py
ENTRYPOINT ["openrlhf-alp"]
CMD ["--help"]
