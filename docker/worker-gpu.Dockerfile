# The worker that drafts. torch's own wheels bring CUDA 13; the NVIDIA runtime brings the driver, which must be of release 580
# or newer for it. The checkpoint is mounted.
# Build from the repository root:
#   docker build -f docker/worker-gpu.Dockerfile -t mu2-worker-gpu .

FROM python:3.11.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mu2
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY worker worker
COPY dicom_listener dicom_listener
COPY mu2_model mu2_model
COPY training training
COPY migrations migrations
RUN /opt/mu2/bin/pip install -c constraints.txt '.[worker]'

FROM python:3.11.11-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin mu2 \
    && install -d -o mu2 -g mu2 -m 0750 /var/lib/mu2 /srv/mu2/store /models
COPY --from=build /opt/mu2 /opt/mu2
# The two HF variables keep transformers from looking for anything outside.
ENV PATH=/opt/mu2/bin:$PATH PYTHONUNBUFFERED=1 MU2_HOME=/var/lib/mu2 MU2_STORE__URL=/srv/mu2/store \
    HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTORCH_ALLOC_CONF=expandable_segments:True \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /var/lib/mu2
USER mu2
EXPOSE 9102
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9102/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["celery", "-A", "worker", "worker", "-Q", "draft"]
