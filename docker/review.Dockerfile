# The review page. It shares the worker's packages (volumes, HL7 text); torch for CPUs, because no model runs here.
# Build from the repository root:
#   docker build -f docker/review.Dockerfile -t mu2-review .
FROM python:3.11.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mu2
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
# The CPU build of torch spares 5 GB of CUDA libraries. TORCH_INDEX is the address of PyTorch's own index of CPU wheels, as its
# installation page gives it; it holds torch, and not every version of what torch needs: those come with the next
# installation, which finds torch satisfied. Without the argument torch comes from the usual index, CUDA included.
ARG TORCH_INDEX
RUN if [ -n "$TORCH_INDEX" ]; then /opt/mu2/bin/pip install -c constraints.txt --no-deps --index-url "$TORCH_INDEX" torch; fi
COPY worker worker
COPY dicom_listener dicom_listener
COPY mu2_model mu2_model
COPY training training
COPY migrations migrations
RUN /opt/mu2/bin/pip install -c constraints.txt '.[review,worker]'

FROM python:3.11.11-slim-bookworm
# Letters of Chinese, Japanese and Korean names in the PDF.
RUN apt-get update && apt-get install -y --no-install-recommends fonts-wqy-microhei && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin mu2 \
    && install -d -o mu2 -g mu2 -m 0750 /var/lib/mu2 /srv/mu2/store
COPY --from=build /opt/mu2 /opt/mu2
ENV PATH=/opt/mu2/bin:$PATH PYTHONUNBUFFERED=1 MU2_HOME=/var/lib/mu2 MU2_STORE__URL=/srv/mu2/store
WORKDIR /var/lib/mu2
USER mu2
EXPOSE 8080 9103
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9103/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["mu2", "review"]
