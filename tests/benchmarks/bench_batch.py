"""A batch of long documents: the adaptive draft against fixed ones and plain decoding.

    python -m tests.benchmarks.bench_batch --corpus documents.jsonl.zst [--documents 60]

`--corpus`: a JSON object a line with a `text`. Every document is cut to a length of 500 to 7,000
tokens, seeded. Each arm is the whole command's path (Ray Data, router, engine) over a fresh engine
whose prefix cache holds all documents. It runs the batch for one token each, twice, and then for
all of them: the first run computes the prompts, the others find them there, and the second is what
a job takes beside its decoding. The decode rate is the other tokens over the difference of the last
two; the total rate counts all tokens, and that difference with the first run. Arms run in turn,
so a machine that slows down is not told from a slow arm: `--repetitions` runs them all again, in
the other order every second time. `--in-process` leaves Ray out (batch_in_process.py): one engine
for all arms, whose prompts are computed once.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from magicdec.deployments.batch_answered import AnsweredIndex
from magicdec.deployments.batch_dataset import outcomes
from magicdec.deployments.batch_engines import ray_cluster
from magicdec.deployments.batch_files import opened
from magicdec.deployments.batch_job import JobRules
from magicdec.deployments.batch_job import opened as opened_job
from magicdec.deployments.batch_manifest import Manifest
from magicdec.deployments.batch_outcome import Outcome
from magicdec.deployments.batch_progress import Figures, ProgressView
from magicdec.deployments.batch_row import COMPLETIONS_URL, RowDefaults
from magicdec.deployments.batch_sources import JsonLines
from magicdec.deployments.batch_stages import engine_stages
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.deployments.live_bench import PLAIN
from magicdec.deployments.settings import ServeSettings, load_settings
from magicdec.model_loader import load_tokenizer
from tests.benchmarks.batch_in_process import InProcess
from tests.benchmarks.bench_acceptance import machine_name
from tests.benchmarks.policy_arms import ADAPTIVE, FIXED

SHORTEST, LONGEST = 500, 7000  # tokens of a document
APP_NAME = "magicdec-bench-batch"


@dataclass(frozen=True, slots=True)
class Measured:
    """One arm, once. Tokens a second."""

    decode_rate: float
    total_rate: float
    mean_acceptance_length: float | None


def main() -> None:
    args = parse_arguments()
    print(f"{machine_name()}, {args.model} {args.dtype}, {args.documents} documents")
    prompts = cut_documents(args)
    arms = args.arms or [PLAIN, *FIXED, ADAPTIVE]
    found: dict[str, list[Measured]] = {arm: [] for arm in arms}
    turns = [arms[::-1] if turn % 2 else arms for turn in range(args.repetitions)]
    measurements = in_process if args.in_process else by_jobs
    for arm, measured in measurements([arm for turn in turns for arm in turn], prompts, args):
        found[arm].append(measured)
        print(f"{arm:>10}: decode {measured.decode_rate:7.1f} tokens/s, "
              f"all {measured.total_rate:7.1f} tokens/s", flush=True)  # fmt: skip
    report(found)


def by_jobs(
    arms: list[str], prompts: list[list[int]], args: argparse.Namespace
) -> Iterator[tuple[str, Measured]]:
    """An engine for each arm, each time."""
    with ray_cluster(None, show_worker_logs=False), tempfile.TemporaryDirectory() as folder:
        for arm in arms:
            yield arm, measure(arm, prompts, Path(folder), args)


def in_process(
    arms: list[str], prompts: list[list[int]], args: argparse.Namespace
) -> Iterator[tuple[str, Measured]]:
    """One engine for all of them."""
    engine, num_prompt_tokens = InProcess(prompts, args), sum(len(ids) for ids in prompts)
    prefill = engine.run(PLAIN, 1).seconds
    for arm in arms:
        again, decoding = engine.run(arm, 1), engine.run(arm, args.tokens)
        seconds, num_tokens = decoding.seconds - again.seconds, decoding.num_tokens
        yield (
            arm,
            Measured(
                (num_tokens - again.num_tokens) / seconds,
                (num_prompt_tokens + num_tokens) / (prefill + seconds),
                decoding.mean_acceptance_length,
            ),
        )


def cut_documents(args: argparse.Namespace) -> list[list[int]]:
    """Token ids. Raises SystemExit where the corpus is too small."""
    tokenizer = load_tokenizer(resolve_model(args.model))
    chooser = random.Random(args.seed)
    prompts: list[list[int]] = []
    with opened(args.corpus) as file:
        texts = [json.loads(line)["text"] for line in file]
    for number in range(args.documents):
        text = texts[number % len(texts)]
        length = chooser.randint(args.shortest, args.longest)
        start = chooser.randrange(max(1, len(text) - 8 * length))
        ids = tokenizer(text[start : start + 8 * length])["input_ids"][:length]
        if len(ids) < min(length, args.shortest):
            raise SystemExit(f"document {number} of {args.corpus} has {len(ids)} tokens: too few")
        prompts.append(list(ids))
    return prompts


def measure(arm: str, prompts: list[list[int]], folder: Path, args: argparse.Namespace) -> Measured:
    settings = arm_settings(arm, args)
    with engine_stages(settings, APP_NAME, max_live_rows=None, patience_s=600.0) as (many, one):

        def run(num_tokens: int) -> Figures:
            source = JsonLines(str(write_rows(folder / "in.jsonl", prompts, num_tokens, args)))
            defaults = RowDefaults((settings.model.name,))

            def answerer(answered: AnsweredIndex, alone: bool) -> Iterator[Outcome]:
                return outcomes(source, defaults, answered, one if alone else many)

            output, console = folder / f"out-{num_tokens}.jsonl", Console(stderr=True)
            output.unlink(missing_ok=True)
            rules = JobRules(force=True)
            with opened_job(source, output, defaults, Manifest({}, {}), rules) as job:
                job.check(None, lambda: None)
                figures = job.prepare()
                with ProgressView(console, figures) as view:
                    job.run(answerer, view, figures)
            return figures

        prefill, again, decoding = run(1), run(1), run(args.tokens)
    if cached_tokens(folder / f"out-{args.tokens}.jsonl") < 0.9 * decoding.prompt_tokens:
        raise SystemExit(f"{arm}: the cache did not hold the documents; raise --kv-cache-gib")
    seconds = decoding.seconds - again.seconds
    return Measured(
        (decoding.completion_tokens - again.completion_tokens) / seconds,
        (decoding.prompt_tokens + decoding.completion_tokens) / (prefill.seconds + seconds),
        decoding.mean_acceptance_length,
    )


def cached_tokens(output: Path) -> int:
    """Of all prompts of a job, as its answers tell."""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    usages = [line["response"]["body"]["usage"] for line in lines]
    return sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)


def arm_settings(arm: str, args: argparse.Namespace) -> ServeSettings:
    speculation: dict[str, Any] = {}
    if arm == PLAIN:
        speculation = {"draft_length": 0}
    elif arm != ADAPTIVE:
        length, budget = FIXED[arm]
        speculation = {"drafter": "recycled", "draft_length": length, "draft_budget": budget}
    return load_settings(
        None,
        {
            "model": {"path": args.model, "dtype": args.dtype},
            "cache": {"kv_cache_gib": args.kv_cache_gib},
            "speculation": speculation,
        },
    )


def write_rows(
    path: Path, prompts: list[list[int]], num_tokens: int, args: argparse.Namespace
) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number, ids in enumerate(prompts):
            body = {
                "prompt": ids,
                "max_tokens": num_tokens,
                "ignore_eos": True,
                "temperature": args.temperature,
                "seed": number,
            }
            row = {"custom_id": str(number), "url": COMPLETIONS_URL, "body": body}
            file.write(json.dumps(row) + "\n")
    return path


def report(found: dict[str, list[Measured]]) -> None:
    decode = {arm: statistics.median(m.decode_rate for m in runs) for arm, runs in found.items()}
    print(
        "\n| draft | decode, tokens/s | all, tokens/s | tokens a round |\n| --- | --: | --: | --: |"
    )
    for arm, runs in found.items():
        total = statistics.median(m.total_rate for m in runs)
        length = runs[-1].mean_acceptance_length
        shown = "-" if length is None else f"{length:.2f}"
        print(f"| {arm} | {decode[arm]:.1f} | {total:.1f} | {shown} |")
    best = max((rate for arm, rate in decode.items() if arm != ADAPTIVE), default=None)
    if ADAPTIVE in decode and best is not None:
        print(f"\nadaptive over the best fixed: {decode[ADAPTIVE] / best:.3f}")
    if ADAPTIVE in decode and PLAIN in decode:
        print(f"adaptive over plain: {decode[ADAPTIVE] / decode[PLAIN]:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--shortest", type=int, default=SHORTEST)
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-gib", type=float, default=8.0)
    parser.add_argument("--arms", nargs="+", choices=[PLAIN, *FIXED, ADAPTIVE])
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--in-process", action="store_true", help="one engine, without Ray")
    parser.add_argument("--threads", type=int, default=2, help="of that engine")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
