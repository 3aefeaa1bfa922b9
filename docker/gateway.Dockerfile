# The gateway: Starlette and gRPC, without torch and Triton. Runs with a read-only root file system.
#
#   docker build -f docker/gateway.Dockerfile -t hypergen-gateway .

# The Python version of the tests.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY docker/constraints.txt docker/
COPY pyproject.toml LICENSE ./
# The requirements in a layer of their own, which a change of the sources leaves as it is: the packages are still empty.
RUN mkdir -p model_repository/diffusion export/hypergen_export export/emoji/checkpoint gateway/hypergen_gateway \
    && touch README.md \
    && python -m venv /opt/hypergen \
    && /opt/hypergen/bin/pip install --no-cache-dir --constraint docker/constraints.txt ".[otel,s3]"
COPY model_repository model_repository
COPY export export
COPY gateway gateway
COPY README.md ./
RUN /opt/hypergen/bin/pip install --no-cache-dir --no-deps --force-reinstall . \
    && /opt/hypergen/bin/pip uninstall --yes setuptools pip

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/hypergen /opt/hypergen
ENV PATH=/opt/hypergen/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HYPERGEN_CACHE_DIR=/tmp/hypergen
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/health/live'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["hypergen"]
CMD ["serve", "--triton-url", "triton:8001"]
