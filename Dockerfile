# The image that serves the predictor: docker build -t blip [--build-arg NAME=VALUE] .
#
#   WEIGHTS  the bundle to bake in: none, demo, pretrained, a bundle's directory inside the build context, or what
#            `bundle make` takes, such as "--caption large_coco" or "--caption models/mine.pth --dtype float32"
#   TORCH    cuda, or cpu: an image without CUDA, for x86-64 and aarch64
ARG TORCH=cuda
ARG BASE_IMAGE=docker.io/pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime
ARG CPU_BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS cuda
COPY requirements.txt /locks/requirements.txt

FROM ${CPU_BASE_IMAGE} AS cpu
COPY requirements-cpu.txt /locks/requirements.txt

FROM ${TORCH} AS packages
# The environment sees the base's packages: pip takes what is there at the locked version, which is PyTorch with
# CUDA, and installs the rest beside it, hashes checked. It is also the `python` that a plain Debian lacks.
RUN python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "The base image needs Python 3.11.")' \
    && python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --require-hashes -r /locks/requirements.txt
COPY scripts/patch_cog scripts/
RUN scripts/patch_cog python

FROM packages AS weights
ARG WEIGHTS=none
COPY . .
# The cache keeps a finished pretrained bundle, and what others are made of, so that changed code downloads nothing again.
RUN --mount=type=cache,target=/download \
    mkdir /baked \
    && case "$WEIGHTS" in \
        none) ;; \
        demo) cp -R weights/demo /baked/demo ;; \
        pretrained) scripts/download_models --out /download/pretrained --dtype float16 \
            && cp -R /download/pretrained /baked/pretrained ;; \
        --*) ln -s /download /baked/blip-downloads \
            && scripts/run blip bundle make /baked/custom --keep $WEIGHTS \
            && rm /baked/blip-downloads ;; \
        *) cp -R "$WEIGHTS" /baked/custom ;; \
    esac \
    && python -c 'from pathlib import Path; from blip.weights.bundle import open_bundle; \
        [open_bundle(path).verify() for path in Path("/baked").iterdir()]' \
    && chmod -R a+rX /baked

FROM packages
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp blip && install -d -o blip -g blip /cache
COPY --from=weights /baked weights
COPY cog.yaml predict.py ./
COPY scripts/entrypoint scripts/probe scripts/
COPY blip blip
RUN python -m compileall -q predict.py blip
ARG VERSION=1.0.0
LABEL org.opencontainers.image.title="blip" \
    org.opencontainers.image.description="BLIP captioning, visual question answering and image-text matching over HTTP" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}"
# The root may be read-only: bytecode is compiled above, and what is written goes to /tmp and /cache.
ENV HOME=/tmp BLIP_CACHE=/cache PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["/src/scripts/probe", "ready"]
ENTRYPOINT ["/src/scripts/entrypoint"]
CMD ["python", "-m", "cog.server.http"]
