"""`python -m magicdec.deployments.drain_pod FILE SECONDS`: what a pod does before it ends.

It writes the file, by which the replicas of this machine take nothing new (server.drain_file), and
returns once Ray's exporter says that they have nothing left, or after so many seconds: streams that
are still open then go on at other replicas.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from magicdec.cluster.metric_table import REQUESTS_RUNNING, REQUESTS_WAITING

METRICS_URL = "http://127.0.0.1:8080/metrics"
EXPORT_LAG_S = 12.0  # Ray exports every ten seconds: what it says first may be of before
PERIOD_S = 2.0


def num_live_sequences(metrics: str) -> int:
    """In the batch or waiting, of all replicas of this machine; 0 where there is no replica."""
    names = (REQUESTS_RUNNING.exported, REQUESTS_WAITING.exported)
    lines = [line for line in metrics.splitlines() if line.startswith(names)]
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


def drain(
    file: Path,
    limit_s: float,
    read_metrics: Callable[[], str],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether nothing was left. An exporter that does not answer says nothing: it goes on waiting.

    `limit_s` in seconds.
    """
    file.touch()
    started = clock()
    while clock() - started < limit_s:
        sleep(PERIOD_S)
        if clock() - started < EXPORT_LAG_S:
            continue
        try:
            if num_live_sequences(read_metrics()) == 0:
                return True
        except (URLError, TimeoutError):
            continue
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Let this pod's replicas finish what they have.")
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--metrics-url", default=METRICS_URL)
    options = parser.parse_args()

    def read() -> str:
        with urlopen(options.metrics_url, timeout=5) as answer:
            return str(answer.read(), "utf-8")

    sys.exit(0 if drain(options.file, options.seconds, read) else 1)


if __name__ == "__main__":
    main()
