# CPU only: docker build -t lit-edit . && docker run --rm -v "$PWD/runs:/work/runs" lit-edit fit --config rome.yaml
FROM python:3.11-slim

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch comes first: with it installed, no other package asks for a build with GPU libraries. TORCH may hold options of
# pip, such as --index-url with PyTorch's index of CPU builds, which makes the image some gigabytes smaller.
ARG TORCH=torch
RUN pip install --no-cache-dir -c constraints.txt $TORCH
COPY lit_edit lit_edit
COPY callbacks callbacks
COPY datamodules datamodules
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt .

RUN useradd --create-home --shell /bin/bash edit && mkdir /work && chown edit /work
USER edit
WORKDIR /work
ENTRYPOINT ["lit-edit"]
CMD ["--help"]
