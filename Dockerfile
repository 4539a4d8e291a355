# The page in a container: docker build -t whisper-demo . && docker run --rm -p 7860:7860 whisper-demo
# For an NVIDIA GPU: docker build --build-arg TORCH=cuda -t whisper-demo . && docker run --rm --gpus all -p 7860:7860 whisper-demo
# Settings are environment variables (demo/space/README.md): docker run -e MODEL=openai/whisper-small -v whisper-cache:/cache ...
FROM python:3.11-slim

# "cpu" takes the build of torch without CUDA, which is gigabytes smaller. Any other value: the default build, which brings its own CUDA.
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    GRADIO_ANALYTICS_ENABLED=False \
    GRADIO_TEMP_DIR=/tmp/uploads \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    PORT=7860

# libgomp: torch's threads. Everything else comes with the wheels.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 user && mkdir -p /cache /tmp/uploads && chown user:user /cache /tmp/uploads

# torch first: it is the largest part and changes least, so an edit of the package does not fetch it again.
COPY constraints-cpu.txt /build/
RUN if [ "$TORCH" = cpu ]; then \
      pip install --constraint /build/constraints-cpu.txt --extra-index-url "$TORCH_INDEX" torch; \
    else \
      pip install "torch>=2.6"; \
    fi

COPY . /build/source
RUN if [ "$TORCH" = cpu ]; then constraint="--constraint /build/constraints-cpu.txt"; fi; \
    pip install $constraint "/build/source[demo]" && rm -rf /build

USER user
WORKDIR /home/user
VOLUME /cache
EXPOSE 7860

# A model from the Hub may take minutes to arrive at the first start.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 \
    CMD python -c "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/', timeout=8)"

STOPSIGNAL SIGTERM
CMD ["python", "-m", "demo.space.app"]
