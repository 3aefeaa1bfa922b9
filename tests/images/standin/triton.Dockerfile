# Stands in for NVIDIA's image of Triton where it cannot be had: the tritonserver of the PyPI wheel at NVIDIA's paths, the
# same user, entry point and Python packages, and the OpenVINO backend of `hypergen serve` instead of TensorRT's.
# tests/images/bases.py fills the context. libnvinfer.so only states a release.

ARG BASE
FROM ${BASE}
ENV PATH=/opt/tritonserver/bin:${PATH} \
    LD_LIBRARY_PATH=/opt/tritonserver/lib \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    TRITON_SERVER_USER=triton-server
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl libpython3.11 python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 triton-server \
    && pip3 install --no-cache-dir "numpy<2" openvino virtualenv
COPY tritonserver /opt/tritonserver
COPY nvidia_entrypoint.sh /opt/nvidia/nvidia_entrypoint.sh
COPY hypergen_gateway /usr/local/lib/python3.11/dist-packages/hypergen_gateway
COPY libnvinfer.so.11 /usr/lib/x86_64-linux-gnu/
WORKDIR /opt/tritonserver
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]
