# syntax=docker/dockerfile:1
# Two images of one program, on the same Python 3.11, with the versions of constraints.txt:
#
#   docker build --target cpu  -t ghcr.io/mpt-home/mpt:0.1.0-cpu  .    demos, the download Job, CPU serving, conversion
#   docker build --target cuda -t ghcr.io/mpt-home/mpt:0.1.0-cuda .    Ray pods and training pods with GPUs
#
# With --build-arg COMMIT=$(git rev-parse HEAD) the server says its commit (/version, mpt_build_info).
# Both run as uid 10001 on a root file system that cannot be written; /tmp (and on Ray pods /tmp/ray, /dev/shm) must be a
# volume. No ENTRYPOINT: KubeRay starts pods with `bash -c "ulimit ...; ray start ..."`, and its probes call wget.
# Ports: 8000 API, 7860 demos, 8080 Ray's metrics, 8265 Ray's dashboard, 6379 GCS, 10001 Ray client.

# Which extras of pyproject.toml go in. onnxruntime and onnxruntime-gpu are one module in two packages, so `conversion`,
# which brings the first, stays out of the cuda image. `s3` opens s3:// for the download Job and for mirrors of checkpoints.
ARG CPU_EXTRAS=cluster,conversion,data,demos,s3
ARG CUDA_EXTRAS=cluster,gpu,data,qlora,s3
# flash-attn reads prompts on GPUs (docs/kernels.md) where it is there; without it FlexAttention does. Version 4, for
# Hopper and later, is the extra `flash`. Version 2, for Ampere and Ada, has no wheels on PyPI. With CUDA 13's nvcc, the
# torch of constraints.txt and Python 3.11 one is built into dist/ by
#   FLASH_ATTN_CUDA_ARCHS=80 MAX_JOBS=4 pip wheel --no-build-isolation --no-deps -w dist "flash-attn>=2.8,<3"
# and goes into the image with --build-arg FLASH_ATTN_WHEEL=dist/flash_attn-....whl
ARG FLASH_ATTN_WHEEL=

# --- build: one virtual environment per image; compilers, pip's cache and the sources stay behind ---

FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/mpt
ENV PATH=/opt/mpt/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt /src/

FROM build AS build-cpu
ARG CPU_EXTRAS
# PyPI's torch brings 3 GB of CUDA libraries; PyTorch's own index has it without. First, since it changes least.
RUN --mount=type=cache,target=/root/.cache/pip \
    torch=$(grep '^torch==' /src/constraints.txt) \
    && pip install -c /src/constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "${torch}+cpu"
ARG COMMIT=
ENV MPT_COMMIT=${COMMIT}
COPY . /src/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c /src/constraints.txt "/src[${CPU_EXTRAS}]"

FROM build AS build-cuda
ARG CUDA_EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c /src/constraints.txt "$(grep '^torch==' /src/constraints.txt)"
ARG COMMIT=
ENV MPT_COMMIT=${COMMIT}
COPY . /src/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c /src/constraints.txt "/src[${CUDA_EXTRAS}]"
ARG FLASH_ATTN_WHEEL
RUN if [ -n "${FLASH_ATTN_WHEEL}" ]; then pip install -c /src/constraints.txt "/src/${FLASH_ATTN_WHEEL}"; fi

# --- cpu ---

FROM python:3.11-slim-bookworm AS cpu
# No compiler: the stage above compiled the C code for all processors (hatch_build.py).
RUN apt-get update \
    && apt-get install --no-install-recommends -y bash ca-certificates wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 mpt \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /bin/bash mpt
COPY --from=build-cpu /opt/mpt /opt/mpt
# HOME and every cache lie in the one folder that can be written. USER is read by torch's compiler cache.
# PYTHONDONTWRITEBYTECODE only here: pip compiled the packages above, for a faster start.
ENV PATH=/opt/mpt/bin:$PATH \
    HOME=/tmp USER=mpt HF_HOME=/tmp/huggingface MPT_CACHE=/tmp/mpt \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 7860 8080
CMD ["mpt", "--help"]

# --- cuda ---

# `base`, not `runtime`: torch brings its own cuBLAS, cuDNN and NCCL, and the loader would prefer the image's to them.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS cuda
# The libraries are those the copied Python (built on Debian 12) was linked with. gcc and libc6-dev, against the rule of
# no compiler in an image: Triton compiles a small C launcher for each kernel at run time ("Failed to find C compiler"
# otherwise), and FlexAttention, our prefill on GPUs, is made of such kernels.
RUN apt-get update \
    && apt-get install --no-install-recommends -y \
        bash ca-certificates wget gcc libc6-dev \
        libbz2-1.0 libexpat1 libffi8 liblzma5 libncursesw6 libreadline8t64 libsqlite3-0 libssl3t64 libuuid1 zlib1g \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 mpt \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /bin/bash mpt
COPY --from=build-cuda /usr/local/bin/ /usr/local/bin/
COPY --from=build-cuda /usr/local/lib/ /usr/local/lib/
COPY --from=build-cuda /usr/local/include/python3.11/ /usr/local/include/python3.11/
COPY --from=build-cuda /opt/mpt /opt/mpt
RUN ldconfig
# LD_LIBRARY_PATH: where some clouds mount the driver (GKE); without the image's own /usr/local/cuda/lib64, see above.
ENV PATH=/opt/mpt/bin:$PATH \
    HOME=/tmp USER=mpt HF_HOME=/tmp/huggingface MPT_CACHE=/tmp/mpt \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton MPLCONFIGDIR=/tmp/matplotlib \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 8080
CMD ["mpt", "--help"]
