#!/usr/bin/env bash
# API_KEY is the key that clients send.
set -euo pipefail
cd "$(dirname "$0")"
MODEL=${MODEL:-org/base-7b}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
MAX_MODEL_LEN=${MAX_MODEL_LEN:-8192}
exec python3 -m sglang.launch_server --model-path "$MODEL" \
  --revision 0123456789abcdef0123456789abcdef01234567 \
  --served-model-name base \
  --dtype bfloat16 \
  --context-length "$MAX_MODEL_LEN" \
  --host "$HOST" --port "$PORT" \
  --chat-template chat_template.jinja \
  --enable-lora --max-lora-rank 24 \
  --max-loras-per-batch 2 \
  --lora-paths invoices=adapters/invoices \
    tickets-2=adapters/tickets-2 \
  ${API_KEY:+--api-key "$API_KEY"} \
  "$@"
