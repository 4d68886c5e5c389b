# Training, tests and the other scripts on a machine with an NVIDIA GPU, or on its CPU. See docs/install.md.
#
#   docker build -t hybrid .
#   mkdir -p runs
#   docker run --rm --gpus all -v "$PWD/runs:/workspace/runs" hybrid --dataset arc --batch-size 16
#
# Shards are mounted beside the code, because data/ holds some of it: -v "$PWD/data:/shards" … --data-dir /shards
#
# Ubuntu 24.04 with its own Python and PyTorch's CUDA build; the newest image for which mamba-ssm has prebuilt wheels.
ARG BASE=pytorch/pytorch:2.10.0-cuda13.0-cudnn9-devel
FROM ${BASE}

# What changes least comes first: a change of the code rebuilds nothing but the last layer.
# Triton compiles a small C program when it first meets a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# A virtual environment that also sees the image's packages: pip neither touches the system's (PEP 668) nor, held by
# the constraint, replaces its torch.
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv --system-site-packages --without-pip /opt/venv \
    && python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > /opt/torch.txt
ENV PIP_CONSTRAINT=/opt/torch.txt

WORKDIR /workspace
COPY requirements.txt requirements-dev.txt ./
RUN python -m pip install -r requirements-dev.txt

# kernels: mamba-ssm's Triton kernels, all that training uses; nothing is compiled. full: the whole package and
# causal-conv1d, prebuilt for this base (for another torch they compile for half an hour). none: the plain scan.
ARG MAMBA=kernels
RUN case "$MAMBA" in \
        kernels) MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
                 python -m pip install --no-build-isolation --no-deps --no-binary=mamba-ssm mamba-ssm==2.3.2.post1 ;; \
        full)    python -m pip install --no-build-isolation causal-conv1d==1.6.2.post1 mamba-ssm==2.3.2.post1 ;; \
        none)    ;; \
        *)       echo "MAMBA must be kernels, full or none, not $MAMBA" >&2; exit 1 ;; \
    esac

# The ARC tasks come out of an installed package: nothing is fetched when the image runs.
COPY data/__init__.py data/files.py data/flags.py data/
COPY arc_data/*.py arc_data/
RUN python arc_data/prepare.py && python arc_data/prepare.py --version arcagi2

# Any user id may run the image, known to it or not, and write to these folders; runs and /cache are for mounting.
# hadolint ignore=DL3064
ENV HOME=/cache USER=hybrid XDG_CACHE_HOME=/cache TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TIKTOKEN_CACHE_DIR=/cache/tiktoken PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    PYTEST_ADDOPTS="-p no:cacheprovider"
RUN mkdir -p runs data /cache && chmod 1777 runs data /cache
COPY . .
USER 1000:1000
ENTRYPOINT ["python", "train.py"]
