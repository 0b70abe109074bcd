# Docker or buildah: docker build -t distgan . ; docker run --gpus all --shm-size=8g distgan doctor
# The base holds Python 3.11 or newer and pip; torch's wheels bring CUDA along, the host its driver.
ARG BASE=docker.io/library/python:3.12.11-slim-bookworm
FROM ${BASE}

# A compiler and ninja, because DeepSpeed builds some of its kernels when they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*

# The dependencies alone first: they are large and change seldom.
WORKDIR /opt/distgan
COPY pyproject.toml README.md LICENSE ./
# hadolint ignore=DL3013
RUN mkdir distgan && touch distgan/__init__.py \
    && python3 -m pip install --no-cache-dir --disable-pip-version-check '.[deepspeed,s3]' \
    && python3 -m pip uninstall --yes --quiet distgan && rm -rf distgan build ./*.egg-info

COPY distgan distgan
COPY launch launch
COPY configs configs
RUN python3 -m pip install --no-cache-dir --disable-pip-version-check --no-deps . && rm -rf build ./*.egg-info

# Runs and caches go to volumes or to this user's home.
RUN useradd --create-home --uid 1000 distgan
USER 1000
WORKDIR /home/distgan
ENV PYTHONUNBUFFERED=1

# An image that cannot do what it is for is not built.
RUN distgan doctor

ENTRYPOINT ["distgan"]
CMD ["--help"]
