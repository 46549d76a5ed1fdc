#!/usr/bin/env bash
# Asks the server the test rows of each run; exits with 4 unless it answers as they did.
set -uo pipefail
URL=${URL:-http://127.0.0.1:8000/v1}
status=0
tunesmith verify '/runs/it'"'"'s/invoices' --url "$URL" --model invoices "$@" || status=$?
tunesmith verify /runs/tickets-2 --url "$URL" --model tickets-2 "$@" || status=$?
exit "$status"
