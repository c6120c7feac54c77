"""How long the check of a batch's input takes, and how much memory: a million rows of 1 KB.

    python -m tests.benchmarks.bench_batch_check [--rows 1000000] [--model smollm2-135m-instruct]

It runs `magicdec batch run --dry-run` as a process of its own over rows that it writes first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards make a brew for queens "
ROW_BYTES = 1024


def write_rows(path: Path, num_rows: int) -> None:
    """Chat rows of ROW_BYTES, each with an id and a prompt of its own."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            empty = len(_row(number, ""))
            file.write(_row(number, (TEXT * 12)[: ROW_BYTES - empty - 1]) + "\n")


def _row(number: int, text: str) -> str:
    messages = [
        {"role": "system", "content": "You summarise."},
        {"role": "user", "content": f"{number:08} {text}"},
    ]
    body = {"messages": messages, "max_tokens": 200, "temperature": 0.7}
    url = "/v1/chat/completions"
    row = {"custom_id": f"request-{number:08}", "method": "POST", "url": url, "body": body}
    return json.dumps(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write_rows(rows, flags.rows)
        command = [sys.executable, "-m", "magicdec.deployments.cli", "batch", "run"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, str(rows), str(output), "--model", flags.model, "--dry-run"]
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    print(
        f"{flags.rows:,} rows of {ROW_BYTES:,} bytes: exit code {code}, {seconds:.1f} s with the "
        f"start, at most {usage.ru_maxrss * 1024 / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
