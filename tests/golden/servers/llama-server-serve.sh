#!/usr/bin/env bash
# LLAMA_API_KEY is the key that clients send.
set -euo pipefail
cd "$(dirname "$0")"
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
MAX_MODEL_LEN=${MAX_MODEL_LEN:-8192}
exec "${LLAMA_SERVER:-llama-server}" --model model/model-q8_0.gguf \
  --alias tickets-2 \
  --ctx-size "$MAX_MODEL_LEN" \
  --host "$HOST" --port "$PORT" \
  --jinja \
  "$@"
