"""What slow attackers cost the others: slowhttptest beside normal traffic.

usage: slow.py [SECONDS]

A client with a valid key asks the same question again and again on one connection, so each
answer is a hit, and its latency is measured: first alone, then while slowhttptest (Debian's
package) holds 500 connections that send slow heads, send slow bodies, or read slowly.
Limits: attackers and client share this machine, so the attackers' own work is in the figures.
"""

import http.client
import json
import shutil
import subprocess
import sys
import time

from common import KEY, QUESTION, median, ollprox, percentile, script

ATTACKS = {
    "alone": [],
    "slow heads": ["-H", "-i", "1", "-p", "2"],
    "slow bodies": ["-B", "-i", "1", "-s", "8192", "-t", "POST"],
    "slow reads": ["-X", "-w", "10", "-y", "20", "-n", "1", "-z", "5", "-k", "3"],
}


def latencies(port: int, seconds: float) -> list[float]:
    """Ask for so long; return how long each answer took, in milliseconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"APIKEY": KEY, "Content-Type": "application/json"}
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.perf_counter()
        connection.request("POST", "/call_model", QUESTION, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.status
        assert json.loads(answer.read())["done"] is True
        times.append(1000 * (time.perf_counter() - begun))
        time.sleep(0.002)
    connection.close()
    return times


def main() -> int:
    seconds = float(sys.argv[1]) if sys.argv[1:] else 10.0
    tool = shutil.which("slowhttptest")
    if tool is None:
        print("slowhttptest is not installed (apt-get install slowhttptest)")
        return 1
    print("| traffic | answers | median ms | 99 % ms | most ms |\n| --- | --- | --- | --- | --- |")
    with script("fast_ollama.py") as upstream, ollprox(upstream) as (port, _):
        for name, options in ATTACKS.items():
            attack = None
            if options:
                url = f"http://127.0.0.1:{port}/call_model"
                command = [tool, *options, "-c", "500", "-r", "200", "-l", str(int(seconds) + 2)]
                attack = subprocess.Popen(
                    [*command, "-u", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                time.sleep(2)
            times = latencies(port, seconds)
            if attack is not None:
                attack.terminate()
                attack.wait()
            row = median(times), percentile(times, 0.99), max(times)
            print(
                f"| {name} | {len(times)} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
