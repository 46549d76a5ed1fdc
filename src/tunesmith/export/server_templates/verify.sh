#!/usr/bin/env bash
# Asks the server the test rows of each run; exits with 4 unless it answers as they did.
set -uo pipefail
URL=${URL:-http://127.0.0.1:8000/v1}
status=0
{% for adapter in deployment.adapters %}
tunesmith verify {{ adapter.run_path | quote }} --url "$URL" --model {{ "base:" if target == "ray" }}{{ adapter.name }} "$@" || status=$?
{% endfor %}
exit "$status"
