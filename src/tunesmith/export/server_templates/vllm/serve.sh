#!/usr/bin/env bash
# VLLM_API_KEY is the key that clients send.
{% include "head.sh" %}
exec vllm serve "$MODEL" \
{% if deployment.revision %}
  --revision {{ deployment.revision }} \
{% endif %}
  --served-model-name base \
  --dtype {{ deployment.dtype }} \
  --max-model-len "$MAX_MODEL_LEN" \
  --host "$HOST" --port "$PORT" \
{% if deployment.has_template %}
  --chat-template chat_template.jinja \
{% endif %}
  --generation-config generation \
  --enable-lora --max-lora-rank {{ deployment.vllm_rank }} \
  --max-loras {{ deployment.max_loras }} --max-cpu-loras {{ deployment.adapters | length }} \
{% for adapter in deployment.adapters %}
  {{ "--lora-modules" if loop.first else " " }} '{"name": "{{ adapter.name }}", "path": "adapters/{{ adapter.name }}", "base_model_name": "base"}' \
{% endfor %}
  "$@"
