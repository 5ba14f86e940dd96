# The job that brings the database to the newest revision before the services start.
# Build from the repository root:
#   docker build -f docker/migrations.Dockerfile -t mu2-migrations .

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
RUN /opt/mu2/bin/pip install -c constraints.txt .

FROM python:3.11.11-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin mu2 \
    && install -d -o mu2 -g mu2 -m 0750 /var/lib/mu2
COPY --from=build /opt/mu2 /opt/mu2
ENV PATH=/opt/mu2/bin:$PATH PYTHONUNBUFFERED=1 MU2_HOME=/var/lib/mu2
WORKDIR /var/lib/mu2
USER mu2
HEALTHCHECK --interval=10s --timeout=10s CMD ["mu2", "db", "current"]
CMD ["mu2", "db", "upgrade"]
