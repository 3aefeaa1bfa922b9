# Everything in one container, for a machine without a GPU: `hypergen serve` with Triton from its PyPI wheel.
#
# NVIDIA's image has an OpenVINO backend too, but it fixes every call at the largest batch: a smaller one is rejected, or
# padded. With step-level batching, calls have as many rows as images are in progress. The backend of `hypergen serve`
# runs each batch at its own size.
#
#   docker build -f docker/cpu.Dockerfile -t hypergen-cpu .

# Triton's wheel has a Python backend for this version and needs libpython, which these images have.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY docker/constraints.txt docker/
COPY pyproject.toml LICENSE ./
# The requirements in a layer of their own, which a change of the sources leaves as it is: the packages are still empty.
RUN mkdir -p model_repository/diffusion export/hypergen_export export/emoji/checkpoint gateway/hypergen_gateway \
    && touch README.md \
    && python -m venv /opt/hypergen \
    && /opt/hypergen/bin/pip install --no-cache-dir --constraint docker/constraints.txt \
        --extra-index-url "${TORCH_INDEX}" ".[all]"
COPY model_repository model_repository
COPY export export
COPY gateway gateway
COPY README.md ./
RUN /opt/hypergen/bin/pip install --no-cache-dir --no-deps --force-reinstall . \
    && /opt/hypergen/bin/pip uninstall --yes pip

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/hypergen /opt/hypergen
# The cache is writable for group 0 as well: OpenShift runs containers as a user of its own in that group.
RUN useradd --uid 10001 --user-group --no-create-home hypergen \
    && install --directory --owner=10001 --group=0 --mode=775 /cache
ENV PATH=/opt/hypergen/bin:${PATH} \
    HF_HOME=/cache/hub \
    HOME=/cache \
    HYPERGEN_CACHE_DIR=/cache/hypergen \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
VOLUME /cache
EXPOSE 8000
# The first start downloads and exports the model, which takes as long as the network and the disk do. The first success
# ends the period.
HEALTHCHECK --interval=10s --timeout=3s --start-period=4h \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/health/live'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["hypergen"]
CMD ["serve"]
