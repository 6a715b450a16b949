#!/usr/bin/env bash
# Shows a miss and a hit, with a stand-in for Ollama. Usage: demo.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
upstream=$(port) listen=$(port) keys=$(mktemp)
# Whatever .env says: an empty value means the default.
for name in $(sed -n 's/^#\{0,1\}\([A-Z_]*\)=.*/\1/p' .env.example); do export "$name="; done
"$python" keystore.py new --label demo | sed -n 's/^line to append.*: //p' >"$keys"
key=$(sed 's/ .*//' "$keys")

"$python" tests/standin.py --port "$upstream" --pace 0.2 >/dev/null &
standin=$!
OLLAMA_HOST=127.0.0.1 OLLAMA_PORT="$upstream" LISTEN_HOST=127.0.0.1 LISTEN_PORT="$listen" \
	API_KEY_FILE="$keys" LOG_LEVEL=WARNING CACHE_TTL=3600 "$python" ollprox.py &
ollprox=$!
trap 'kill "$standin" "$ollprox"; wait; rm -f "$keys"' EXIT
curl -s --retry 50 --retry-delay 0 --retry-max-time 10 --retry-connrefused -o /dev/null "http://127.0.0.1:$listen/health"

ask() {
	curl -sSf -D - -w '\n(%{time_total} s)\n' "http://127.0.0.1:$listen/call_model" \
		-H "APIKEY: $key" -H 'Content-Type: application/json' \
		-d '{"model": "llama2", "prompt": "What is the capital of France?"}' | grep -Ev '^(Date|Content)'
}
echo; echo "The first time, the model is asked (look at Cache-Status):"; ask
echo; echo "The second time, the answer comes from the cache:"
second=$(ask)
echo "$second"
grep -q 'OllProx; hit' <<<"$second"
