#!/bin/sh
# Starts tritonserver in a container, as safe as serve/triton.py starts it; further flags are handed on and go before.
#   MODELS          model repository, by default /models
#   ADMIN_KEY_FILE  file with the key to the restricted protocols; without one nobody has the key
#   TLS_CERT TLS_KEY TLS_CLIENT_CA   PEM files for gRPC; HTTP then tells health only
set -eu

if [ -n "${ADMIN_KEY_FILE:-}" ]; then
    key=$(cat "$ADMIN_KEY_FILE")
else
    key=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
fi

# Shared memory is for clients in the same container, where there are none. HTTP tells health, inside the container.
restricted=model-repository,trace,logging,shared-memory
http_restricted=$restricted
if [ -n "${TLS_CERT:-}" ]; then
    http_restricted=$restricted,metadata,inference,model-config,statistics
    set -- --grpc-use-ssl=true "--grpc-server-cert=$TLS_CERT" "--grpc-server-key=$TLS_KEY" "$@"
    if [ -n "${TLS_CLIENT_CA:-}" ]; then
        set -- --grpc-use-ssl-mutual=true "--grpc-root-cert=$TLS_CLIENT_CA" "$@"
    fi
fi

exec tritonserver \
    "--model-repository=${MODELS:-/models}" \
    --model-control-mode=none \
    --http-address=127.0.0.1 \
    --metrics-address=0.0.0.0 \
    --allow-sagemaker=false \
    --allow-vertex-ai=false \
    --strict-readiness=true \
    --exit-timeout-secs=10 \
    --log-format=ISO8601 \
    --disable-auto-complete-config \
    "--grpc-restricted-protocol=$restricted:admin-key=$key" \
    "--http-restricted-api=$http_restricted:admin-key=$key" \
    "$@"
