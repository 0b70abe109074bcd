# Build the image and check a machine with it (buildah and podman work too):
#   docker build -t distgan .
#   docker run --gpus all --shm-size=8g distgan doctor
# BASE must have Python 3.11 or newer and pip. torch's wheels contain CUDA. The host provides the driver.
ARG BASE=docker.io/library/python:3.12.11-slim-bookworm
FROM ${BASE}

# DeepSpeed compiles some of its kernels on first use, which needs a compiler and ninja.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*

# Install the dependencies in a layer of their own, because they are large and rarely change.
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

# Write runs and caches to mounted volumes or to the home folder of this user.
RUN useradd --create-home --uid 1000 distgan
USER 1000
WORKDIR /home/distgan
ENV PYTHONUNBUFFERED=1

# Fail the build if distgan does not work in the image.
RUN distgan doctor

ENTRYPOINT ["distgan"]
CMD ["--help"]
