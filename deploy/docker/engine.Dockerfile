# vLLM with Tidegate's load format: the official image, and Tidegate's package beside it, which vLLM finds by
# its entry point (vllm.general_plugins). Nothing of vLLM is changed; without `--load-format tidegate` it loads
# as ever.
#
#   docker build -f deploy/docker/engine.Dockerfile -t tidegate-engine:0.1.0 .   (from the checkout's root)
#
# How far it has been tried: README.md beside this file.

FROM vllm/vllm-openai:v0.32.0

COPY LICENSE README.md pyproject.toml /src/
COPY autoscaler /src/autoscaler
COPY forecaster /src/forecaster
COPY gateway /src/gateway
COPY loaders /src/loaders
COPY modelcache /src/modelcache
COPY router /src/router

# Without what the gateway needs: the load format takes torch from vLLM, and of others xxhash.
RUN python3 -m pip install --no-cache-dir --no-deps /src \
    && python3 -m pip install --no-cache-dir "xxhash>=3.5" \
    && rm -r /src

# The entry point and the user are those of the official image.
