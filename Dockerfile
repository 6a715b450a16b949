FROM python:3.14-slim AS build
WORKDIR /app
COPY requirements.txt requirements-shared.txt ./
# redis-py is imported only if CACHE_URL is set; it takes 7 MB.
RUN pip install --no-cache-dir --require-hashes --target /packages \
    -r requirements.txt -r requirements-shared.txt
# What .dockerignore lets through: the program and nothing else.
COPY . ./
# Compile now: the root file system is read-only at run time.
RUN python -m compileall -q /app /packages

FROM python:3.14-slim
LABEL org.opencontainers.image.title="OllProx" \
    org.opencontainers.image.description="A small proxy for Ollama: API keys, and answers from a cache" \
    org.opencontainers.image.licenses="MIT"
ENV PYTHONPATH=/packages PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY --from=build /packages /packages
COPY --from=build /app /app
# The first user on most hosts, so that a key file readable only by its owner can be read.
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s CMD ["python", "ollprox.py", "--ping"]
ENTRYPOINT ["python", "/app/ollprox.py"]
