# syntax=docker/dockerfile:1
# docker build --target cpu  -t magicdec:0.1.0-cpu  .      the embedded model is in it
# docker build --target cuda -t magicdec:0.1.0-cuda .      torch brings CUDA's libraries; nodes bring the driver
#
# A release sets BASE by digest: --build-arg BASE=python:3.11.9-slim-bookworm@sha256:...
ARG BASE=python:3.11.9-slim-bookworm

FROM ${BASE} AS build
# DeepSpeed's operators are compiled where they are used, or, as here, not at all.
ENV DS_BUILD_OPS=0 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /opt/venv
WORKDIR /src

# setuptools first: DeepSpeed comes as source, and is built with what is locked.
FROM build AS build-cpu
COPY helm/image/cpu.lock /locks/
RUN grep -A 1 '^setuptools==' /locks/cpu.lock > /locks/setuptools.lock \
    && pip install --require-hashes --no-deps -r /locks/setuptools.lock \
    && pip install --require-hashes --no-deps --no-build-isolation \
        --extra-index-url https://download.pytorch.org/whl/cpu -r /locks/cpu.lock
COPY . .
RUN pip install --no-deps --no-build-isolation --no-index .

FROM build AS build-cuda
COPY helm/image/cuda.lock /locks/
RUN grep -A 1 '^setuptools==' /locks/cuda.lock > /locks/setuptools.lock \
    && pip install --require-hashes --no-deps -r /locks/setuptools.lock \
    && pip install --require-hashes --no-deps --no-build-isolation -r /locks/cuda.lock
COPY . .
RUN pip install --no-deps --no-build-isolation --no-index .

# Without a compiler: nothing that runs here can build anything, and CPUs use torch's kernels.
FROM ${BASE} AS runtime
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp/home \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    PYTHONUNBUFFERED=1
RUN groupadd --gid 1000 magicdec \
    && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp/home magicdec \
    && install --directory --owner 1000 --group 1000 /cache /models
WORKDIR /tmp
EXPOSE 8000 8080
CMD ["magicdec", "serve", "--host", "0.0.0.0"]

FROM runtime AS cpu
ENV DS_ACCELERATOR=cpu
COPY --from=build-cpu /opt/venv /opt/venv
USER 1000:1000

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/venv /opt/venv
USER 1000:1000
