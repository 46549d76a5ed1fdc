#!/usr/bin/env bash
# LLAMA_API_KEY is the key that clients send.
{% include "head.sh" %}
exec "${LLAMA_SERVER:-llama-server}" --model model/{{ deployment.model_file }} \
  --alias {{ deployment.adapters[0].name }} \
  --ctx-size "$MAX_MODEL_LEN" \
  --host "$HOST" --port "$PORT" \
  --jinja \
  "$@"
