# Stands in for the PyTorch image under the guide's Dockerfile: Python 3.11 with pip at /opt/conda, PyTorch in it,
# and no Cog and no LAVIS. PACKAGES is the stage of that name of this repository's Dockerfile.
ARG PACKAGES
FROM ${PACKAGES}
RUN pip uninstall --yes cog salesforce-lavis && ln -s /opt/venv /opt/conda
WORKDIR /
