#!/usr/bin/env bash
# Shows a miss and a hit, with a stand-in for Ollama; or with two, of which one is killed.
# Usage: demo.sh PYTHON [several]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 variant=${2-}
port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
first=$(port) second=$(port) listen=$(port) keys=$(mktemp)
# Whatever .env says: an empty value means the default.
for name in $(sed -n 's/^#\{0,1\}\([A-Z_]*\)=.*/\1/p' .env.example); do export "$name="; done
"$python" keystore.py new --label demo | sed -n 's/^line to append.*: //p' >"$keys"
key=$(sed 's/ .*//' "$keys")
url=http://127.0.0.1:$listen

trap 'kill $(jobs -p) 2>/dev/null; wait; rm -f "$keys"' EXIT
hosts=127.0.0.1:$first
"$python" tests/standin.py --port "$first" --pace 0.2 >/dev/null &
victim=$!
if [[ $variant ]]; then
	hosts+=,127.0.0.1:$second
	"$python" tests/standin.py --port "$second" --pace 0.2 >/dev/null &
fi
up() { curl -s --retry 50 --retry-delay 0 --retry-max-time 10 --retry-connrefused -o /dev/null "$1"; }
up "http://127.0.0.1:$first"
[[ ! $variant ]] || up "http://127.0.0.1:$second"
OLLAMA_HOST=$hosts LISTEN_HOST=127.0.0.1 LISTEN_PORT="$listen" API_KEY_FILE="$keys" \
	LOG_LEVEL=WARNING CACHE_TTL=3600 "$python" ollprox.py &
up "$url/health"

ask() {
	curl -sSf -D - -w '\n(%{time_total} s)\n' "$url/call_model" \
		-H "APIKEY: $key" -H 'Content-Type: application/json' \
		-d '{"model": "llama2", "prompt": "What is the capital of France?"}' | grep -Ev '^(Date|Content)'
}
one_miss_and_one_hit() {
	echo; echo "The first time, the model is asked (look at Cache-Status):"; ask
	echo; echo "The second time, the answer comes from the cache:"
	local second
	second=$(ask)
	echo "$second"
	grep -q 'OllProx; hit' <<<"$second"
}

# Ask 10 different questions at once, and count the answers that are whole.
ten() {
	local pids=() pid whole=0
	for number in 1 2 3 4 5 6 7 8 9 10; do
		curl -sSf "$url/call_model" -H "APIKEY: $key" -o /dev/null \
			-d "{\"model\": \"llama2\", \"prompt\": \"$1 $number\"}" 2>/dev/null &
		pids+=($!)
	done
	for pid in "${pids[@]}"; do wait "$pid" && whole=$((whole + 1)); done
	echo "$whole of 10 requests were answered"
}
state() { curl -sS "$url/metrics" -H "APIKEY: $key" | grep '^ollprox_upstream_up{'; }
two_and_one_is_killed() {
	echo; echo "Two Ollamas:"; state; ten "before"
	echo; echo "One is killed while it answers; what it was answering breaks off:"
	ten "while" &
	local asked=$!
	sleep 0.5
	{ kill -KILL "$victim" && wait "$victim"; } 2>/dev/null || true
	wait "$asked"
	echo; echo "No request after that fails:"
	local after
	after=$(ten "after")
	echo "$after"; state
	[[ $after == "10 of 10 "* ]]
	state | grep -q "127.0.0.1:$first\"} 0"
}
if [[ $variant ]]; then two_and_one_is_killed; else one_miss_and_one_hit; fi
