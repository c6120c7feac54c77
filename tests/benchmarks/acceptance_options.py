"""The acceptance benchmark's command line. Budgets, windows and contexts are in tokens."""

import argparse
from pathlib import Path

from magicdec.config import SelectionConfig
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from tests.benchmarks.acceptance_cells import DRAFTERS, VIEW_DRAFTERS
from tests.benchmarks.acceptance_tasks import TASKS

BLOCKS = ("sampled", "greedy", "needle", "long")
_DEFAULT = SelectionConfig()


def parse_arguments(description: str) -> argparse.Namespace:
    """Exits with a message for a choice that cannot be run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("acceptance.jsonl"), help="results file")
    parser.add_argument("--markdown", type=Path, default=Path("docs/acceptance.md"))
    parser.add_argument("--report", action="store_true", help="only write the tables of --out")
    parser.add_argument("--corpus", type=Path, help='JSON lines {"source", "text"}, plain or .zst')
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    _add_blocks(parser)
    _add_drafters(parser)
    args = parser.parse_args()
    if args.corpus is None and not args.report:
        parser.error("--corpus is needed, unless --report")
    _check_budgets(parser, args)
    return args


def _add_blocks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of sampled and greedy")
    add("--limit", type=int, help="prompts a task, contexts of the needle; default all")
    add("--context", type=int, default=7000)
    add("--max-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.8, help="of the blocks sampled and long")
    add("--needle-tokens", type=int, default=10, help="of an answer")
    add("--small-context", type=int, default=2000, help="needle, where it answers too few")
    add("--long-context", type=int, default=6000)
    add("--long-tokens", type=int, default=1024)


def _add_drafters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--drafters", nargs="+", choices=DRAFTERS, default=list(DRAFTERS))
    add("--long-drafters", nargs="+", choices=DRAFTERS, default=list(VIEW_DRAFTERS[:3]))
    add("--budgets", nargs="+", type=int, default=[256, 512, 1024, 2048])
    add("--small-budgets", nargs="+", type=int, default=[64, 128])
    add("--long-budgets", nargs="+", type=int, default=[512])
    add("--draft-length", type=int, default=4)
    add(
        "--needle-draft-length",
        type=int,
        default=8,
        help="as long as an answer, so that none of its positions is a bonus token",
    )
    add(
        "--draft-model",
        action="append",
        default=[],
        help="folder or embedded model; may be repeated",
    )
    add("--draft-layers", nargs="*", type=int, default=[], help="draft with the first layers")
    add("--draft-window", nargs="+", type=_window, default=[512], help="positions, or full")
    add("--sink", type=int, default=_DEFAULT.num_sink_tokens)
    add("--recent", type=int, default=_DEFAULT.num_recent_tokens)
    add("--small-sink", type=int, default=4, help="with --small-budgets")
    add("--small-recent", type=int, default=16, help="with --small-budgets")
    add("--first-layers", type=int, default=_DEFAULT.num_first_layers)
    add("--first-layers-factor", type=float, default=_DEFAULT.first_layers_factor)
    add("--refresh-rounds", type=int, default=_DEFAULT.refresh_rounds)
    add("--chunk-size", type=int, default=_DEFAULT.chunk_size)
    add("--coverage", type=float, default=_DEFAULT.coverage)


def selection_of(args: argparse.Namespace) -> SelectionConfig:
    return _selection(args, args.sink, args.recent)


def small_selection_of(args: argparse.Namespace) -> SelectionConfig:
    """For budgets that the usual sink and recent window would fill."""
    return _selection(args, args.small_sink, args.small_recent)


def _selection(args: argparse.Namespace, sink: int, recent: int) -> SelectionConfig:
    return SelectionConfig(
        num_sink_tokens=sink,
        num_recent_tokens=recent,
        num_first_layers=args.first_layers,
        first_layers_factor=args.first_layers_factor,
        refresh_rounds=args.refresh_rounds,
        chunk_size=args.chunk_size,
        coverage=args.coverage,
    )


def _window(text: str) -> int | None:
    return None if text == "full" else int(text)


def _check_budgets(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The engine would raise a smaller budget to its least, and the cell would be misnamed."""
    length = max(args.draft_length, args.needle_draft_length)
    for budgets, sink, recent in (
        (args.budgets + args.long_budgets, args.sink, args.recent),
        (args.small_budgets, args.small_sink, args.small_recent),
    ):
        least = sink + recent + length
        if min(budgets) < least:
            parser.error(
                f"a budget must be at least {least} (sink {sink}, recent {recent}, "
                f"draft length {length}), got {min(budgets)}"
            )
