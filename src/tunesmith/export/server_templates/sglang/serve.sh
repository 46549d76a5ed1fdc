#!/usr/bin/env bash
# API_KEY is the key that clients send.
{% include "head.sh" %}
exec python3 -m sglang.launch_server --model-path "$MODEL" \
{% if deployment.revision %}
  --revision {{ deployment.revision }} \
{% endif %}
  --served-model-name base \
  --dtype {{ deployment.dtype }} \
  --context-length "$MAX_MODEL_LEN" \
  --host "$HOST" --port "$PORT" \
{% if deployment.has_template %}
  --chat-template chat_template.jinja \
{% endif %}
  --enable-lora --max-lora-rank {{ deployment.max_rank }} \
  --max-loras-per-batch {{ deployment.max_loras }} \
{% for adapter in deployment.adapters %}
  {{ "--lora-paths" if loop.first else " " }} {{ adapter.name }}=adapters/{{ adapter.name }} \
{% endfor %}
  ${API_KEY:+--api-key "$API_KEY"} \
  "$@"
