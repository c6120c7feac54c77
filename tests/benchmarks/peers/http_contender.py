"""This project's application as a contender: `magicdec serve`, heard through HTTP."""

import argparse
import json
import subprocess
import sys
import time
from functools import partial

import httpx

from tests.benchmarks.peers.contest import Answer, Task, Watch, claim_stdout, serve

_NAME = "served"


class Decoder:
    """Its server is in this process's group, and ends with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._url = f"http://127.0.0.1:{args.port}"
        command = [sys.executable, "-m", "magicdec.deployments.cli", "serve", "--model", args.model]
        command += ["--served-name", _NAME, "--port", str(args.port), "--dtype", args.dtype]
        command += ["--num-threads", str(args.threads), "--kv-cache-gib", str(args.kv_cache_gib)]
        server = subprocess.Popen(command, stdout=sys.stderr)
        while not healthy(args.port):
            if server.poll() is not None:
                raise RuntimeError(f"magicdec serve ended with {server.returncode}")
            time.sleep(0.2)

    def __call__(self, task: Task) -> Answer:
        body = {
            "model": _NAME,
            "prompt": task.prompts,
            "max_tokens": task.num_tokens,
            "temperature": task.temperature,
            "top_p": task.top_p,
            "seed": task.seed,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        watch = Watch(task)
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=600) as stream:
            if stream.status_code != 200:
                raise RuntimeError(f"{stream.status_code}: {stream.read()!r}")
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    watch.add([(choice["index"], choice["token_ids"]) for choice in choices])
        return watch.answer()


def healthy(port: int) -> bool:
    """Whether the server on this machine's port answers that it is."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-cache-gib", type=int, required=True)
    serve(claim_stdout(), partial(Decoder, parser.parse_args()))


if __name__ == "__main__":
    main()
