#!/usr/bin/env bash
# VLLM_API_KEY is the key that clients send.
set -euo pipefail
cd "$(dirname "$0")"
MODEL=${MODEL:-org/base-7b}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
MAX_MODEL_LEN=${MAX_MODEL_LEN:-8192}
exec vllm serve "$MODEL" \
  --revision 0123456789abcdef0123456789abcdef01234567 \
  --served-model-name base \
  --dtype bfloat16 \
  --max-model-len "$MAX_MODEL_LEN" \
  --host "$HOST" --port "$PORT" \
  --chat-template chat_template.jinja \
  --generation-config generation \
  --enable-lora --max-lora-rank 32 \
  --max-loras 2 --max-cpu-loras 2 \
  --lora-modules '{"name": "invoices", "path": "adapters/invoices", "base_model_name": "base"}' \
    '{"name": "tickets-2", "path": "adapters/tickets-2", "base_model_name": "base"}' \
  "$@"
