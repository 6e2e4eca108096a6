# docker build --target cpu -t srum:cpu .      or      docker build --target cuda -t srum:cuda .     (docs/howto/docker.md)
FROM python:3.11-slim AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY grounding grounding
COPY judging judging
COPY train train
COPY srum srum
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS base
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
COPY requirements.txt /srum/
COPY configs /srum/configs
WORKDIR /work
ENTRYPOINT ["srum"]

FROM base AS cpu
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r /srum/requirements.txt
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl

# PyPI's torch for Linux brings its CUDA libraries; the host needs the driver and the NVIDIA container toolkit alone.
FROM base AS cuda
RUN pip install --no-cache-dir -r /srum/requirements.txt
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
