# Statistical flow matching on an NVIDIA GPU.
#   docker build -t sfm .
#   docker run --rm --gpus all -v "$PWD:/work" sfm distill --store /work/store ...
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    VIRTUAL_ENV=/opt/sfm \
    PATH=/opt/sfm/bin:$PATH

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv "$VIRTUAL_ENV"

COPY . /src
# hadolint ignore=DL3013
RUN pip install "/src[quickstart]" && rm -rf /src

RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin sfm
USER 10001
WORKDIR /work

ENTRYPOINT ["sfm"]
CMD ["--help"]
