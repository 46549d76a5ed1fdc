set -euo pipefail
cd "$(dirname "$0")"
{% if target == "llama-server" %}
{% elif deployment.hub_name %}
MODEL=${MODEL:-{{ deployment.hub_name }}}
{% else %}
MODEL=${MODEL:?set it to the folder of {{ deployment.shell_base }}}
{% endif %}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
MAX_MODEL_LEN=${MAX_MODEL_LEN:-{{ deployment.context_length }}}
