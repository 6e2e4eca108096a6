# docker build --target cpu -t srum:cpu .      or      docker build --target cuda -t srum:cuda .     (docs/howto/docker.md)
FROM python:3.11-slim AS source
WORKDIR /srum
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
COPY requirements.txt pyproject.toml README.md LICENSE ./

FROM source AS cpu
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
COPY srum srum
COPY grounding grounding
COPY judging judging
COPY train train
COPY configs configs
RUN pip install --no-cache-dir --no-deps .
WORKDIR /work
ENTRYPOINT ["srum"]

# PyPI's torch for Linux brings its CUDA libraries; the host needs the driver and the NVIDIA container toolkit alone.
FROM source AS cuda
RUN pip install --no-cache-dir -r requirements.txt
COPY srum srum
COPY grounding grounding
COPY judging judging
COPY train train
COPY configs configs
RUN pip install --no-cache-dir --no-deps .
WORKDIR /work
ENTRYPOINT ["srum"]
