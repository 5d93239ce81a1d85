# imnet-prep with its C++ libraries: `docker build -t imnet-prep .`; docs/install.md says how to run it.
FROM python:3.11-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Debian keeps one version of a package: a pinned one would be gone with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ libjpeg62-turbo-dev make \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/imnet-prep
COPY . /src
WORKDIR /src
RUN /opt/imnet-prep/bin/pip install --no-cache-dir '.[browse,dask,export,parquet,remote,tensorboard]' \
    && compgen -G '/opt/imnet-prep/lib/python3.11/site-packages/imnet_prep/images/native/imnet_native.*' \
    && compgen -G '/opt/imnet-prep/lib/python3.11/site-packages/mbv2/kernels/mbv2_kernels.*'

FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libjpeg62-turbo \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 imnet \
    && install --directory --owner imnet /data
COPY --from=build /opt/imnet-prep /opt/imnet-prep
ENV PATH=/opt/imnet-prep/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /data
ENTRYPOINT ["imnet-prep"]
CMD ["--help"]
