# Tidegate with engines of its own, for a pod that has the GPUs of its node: fork servers, sleeping engines, and
# all that `tidegate up` has on a machine. The engine's image, with Tidegate in an environment beside vLLM's.
#
#   docker build -f deploy/docker/engine.Dockerfile -t tidegate-engine:0.1.0 .   (from the checkout's root)
#   docker build -f deploy/docker/node.Dockerfile -t tidegate-node:0.1.0 .

ARG ENGINE=tidegate-engine:0.1.0
FROM $ENGINE

COPY LICENSE README.md pyproject.toml /src/
COPY autoscaler /src/autoscaler
COPY forecaster /src/forecaster
COPY gateway /src/gateway
COPY loaders /src/loaders
COPY modelcache /src/modelcache
COPY router /src/router
COPY deploy/gateway.lock.txt /src/deploy/

RUN python3 -m venv --without-pip /opt/tidegate \
    && python3 -m pip --python /opt/tidegate/bin/python install --no-cache-dir \
        -c /src/deploy/gateway.lock.txt "/src[cache,forecast,gpu]" \
    && rm -r /src

ENV PATH=/opt/tidegate/bin:$PATH \
    PYTHONUNBUFFERED=1

ENTRYPOINT ["tidegate"]
CMD ["--help"]
