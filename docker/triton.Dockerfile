# Triton for GPUs: NVIDIA's image with the sampler's dependencies. The export image builds the engines.
#
#   docker build -f docker/triton.Dockerfile -t hypergen-triton .

# 26.07 or later: earlier releases leak memory in decoupled models' calls to other models. A TensorRT plan loads only in
# the release that built it, so the export image has the same base.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3

FROM ${TRITON_IMAGE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY docker/constraints.txt /opt/hypergen/
# In a separate folder, since pip cannot replace Debian's packages. numpy is listed because this folder is searched first
# and the image has numpy below 2. Searched by a .pth file, since some releases of Triton's Python stub ignore PYTHONPATH.
RUN pip install --no-cache-dir --target /opt/hypergen/packages --constraint /opt/hypergen/constraints.txt \
        --extra-index-url "${TORCH_INDEX}" diffusers numpy tokenizers torch \
    && site=$(python3 -c 'import site; print(site.getsitepackages()[0])') \
    && install --directory "${site}" \
    && echo 'import sys; sys.path.insert(0, "/opt/hypergen/packages")' >"${site}/hypergen.pth" \
    && install --directory --owner=1000 --group=0 --mode=775 /models
COPY --chmod=755 docker/triton/check_plans.py docker/triton/drain.py /opt/hypergen/
# The sampler needs one torch thread; more would only spin while waiting.
# hadolint ignore=DL3064
ENV PYTHONPATH=/opt/hypergen/packages:${PYTHONPATH} \
    OMP_NUM_THREADS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENIZERS_PARALLELISM=false
# The image's user triton-server.
USER 1000:1000
EXPOSE 8000 8001 8002
# The server stays ready when the sampler's process dies; only the model then is not.
HEALTHCHECK --interval=5s --timeout=5s --start-period=15m \
    CMD ["curl", "--noproxy", "*", "--silent", "--fail", "--fail-early", \
         "--output", "/dev/null", "http://127.0.0.1:8000/v2/health/ready", \
         "--output", "/dev/null", "http://127.0.0.1:8000/v2/models/diffusion/ready"]
# HTTP is for probes only. The sampler uses one thread of the pool per image in flight. Connections are closed after a
# minute, once their streams have ended, so that clients resolve the replicas again.
# check_plans.py compares the plans' records with this TensorRT and GPU before anything is loaded.
CMD ["/opt/hypergen/check_plans.py", "tritonserver", \
     "--model-repository=/models/repository", \
     "--disable-auto-complete-config", \
     "--backend-config=python,thread-pool-size=64", \
     "--grpc-max-connection-age=60000", \
     "--exit-timeout-secs=30"]
