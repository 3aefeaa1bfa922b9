# The Triton that serves on a GPU: NVIDIA's, with what the sampler imports. The engines come from the export image.
#
#   docker build -f docker/triton.Dockerfile -t hypergen-triton .

# 26.07 or later: earlier ones lose memory in decoupled models' calls to other models. A TensorRT plan loads only in
# the release that built it, so the export image has the same base.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3

FROM ${TRITON_IMAGE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY docker/constraints.txt /opt/hypergen/
# Beside the image's own packages rather than over them: Debian's cannot be replaced by pip. numpy is named because
# this path is searched first and the image keeps numpy below 2.
RUN pip install --no-cache-dir --target /opt/hypergen/packages --constraint /opt/hypergen/constraints.txt \
        --extra-index-url "${TORCH_INDEX}" diffusers numpy tokenizers torch \
    && install --directory --owner=1000 --group=1000 /models
COPY --chmod=755 docker/triton/check_plans.py docker/triton/drain.py /opt/hypergen/
# The sampler needs one thread of torch's; more would only spin while they wait.
# hadolint ignore=DL3064
ENV PYTHONPATH=/opt/hypergen/packages:${PYTHONPATH} \
    OMP_NUM_THREADS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENIZERS_PARALLELISM=false
# The image's own user triton-server.
USER 1000:1000
EXPOSE 8000 8001 8002
# The server stays ready when the sampler's process dies; the model itself then shows it.
HEALTHCHECK --interval=5s --timeout=5s --start-period=15m \
    CMD ["curl", "--silent", "--fail", "--fail-early", \
         "--output", "/dev/null", "http://127.0.0.1:8000/v2/health/ready", \
         "--output", "/dev/null", "http://127.0.0.1:8000/v2/models/diffusion/ready"]
# HTTP is for the probes alone. The sampler answers each image in flight from a thread of the pool. A connection that
# is closed after a minute, once its streams have ended, makes clients look up who serves: replicas come and go.
# Before anything is loaded, the plans' records are held against this TensorRT and this GPU.
CMD ["/opt/hypergen/check_plans.py", "tritonserver", \
     "--model-repository=/models/repository", \
     "--disable-auto-complete-config", \
     "--backend-config=python,thread-pool-size=64", \
     "--grpc-max-connection-age=60000", \
     "--exit-timeout-secs=30"]
