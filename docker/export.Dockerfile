# The exporter: converts a checkpoint to a Triton repository, with engines built by the serving Triton's TensorRT.
#
#   docker build -f docker/export.Dockerfile -t hypergen-export .

ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3

FROM ${TRITON_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The TensorRT release of TRITON_IMAGE. Only the bindings are installed, which load the image's libnvinfer: a library
# from pip could be another build, whose plans Triton would reject.
ARG TENSORRT=11.1.0.106
WORKDIR /src
COPY docker/triton/check_plans.py docker/triton/
RUN python3 docker/triton/check_plans.py --tensorrt "${TENSORRT}"
COPY docker/constraints.txt docker/
COPY pyproject.toml LICENSE ./
# The requirements in a layer of their own, which a change of the sources leaves as it is: the packages are still empty.
RUN mkdir -p model_repository/diffusion export/hypergen_export export/emoji/checkpoint gateway/hypergen_gateway \
    && touch README.md \
    && virtualenv /opt/hypergen \
    && /opt/hypergen/bin/pip install --no-cache-dir --constraint docker/constraints.txt \
        --extra-index-url "${TORCH_INDEX}" ".[export]" "tensorrt-cu13-bindings==${TENSORRT}" \
    && site=$(/opt/hypergen/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && printf 'from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n' >"${site}/tensorrt.py"
COPY model_repository model_repository
COPY export export
COPY gateway gateway
COPY README.md ./
RUN /opt/hypergen/bin/pip install --no-cache-dir --no-deps --force-reinstall . \
    && /opt/hypergen/bin/pip uninstall --yes pip

FROM ${TRITON_IMAGE}
COPY --from=build /opt/hypergen /opt/hypergen
# Writable for the group as well: OpenShift runs containers as a user of its own in group 0.
RUN install --directory --owner=1000 --group=0 --mode=775 /models /hub
# The image's PYTHONPATH is for Triton's backends.
ENV PATH=/opt/hypergen/bin:${PATH} \
    PYTHONPATH= \
    HF_HOME=/hub \
    HOME=/hub \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The image's user triton-server, which also serves the repository.
USER 1000:1000
WORKDIR /models
# NVIDIA's entry point sets up CUDA's forward compatibility with older drivers.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "hypergen"]
CMD ["export", "--help"]
