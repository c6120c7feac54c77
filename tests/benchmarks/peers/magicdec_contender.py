"""This project's engine as a contender, plain and adaptive over one loaded model."""

import argparse
import itertools
from functools import partial

from magicdec.config import (
    AdaptiveConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from magicdec.deployments.engine_builder import build_engine
from magicdec.deployments.live_bench import LiveBench
from magicdec.types import Request, SamplingParams
from tests.benchmarks.peers.contest import Answer, Task, Watch, claim_stdout, serve

_BLOCK_SIZE = CacheConfig().block_size


class Decoder:
    def __init__(self, args: argparse.Namespace) -> None:
        config = EngineConfig(
            model=ModelConfig(args.model, args.dtype),
            cache=CacheConfig(num_blocks=args.kv_tokens // _BLOCK_SIZE),
            scheduler=SchedulerConfig(max_num_seqs=args.max_num_seqs),
            speculation=SpeculativeConfig(adaptive=AdaptiveConfig()),
        )
        self._live = LiveBench(build_engine(config))
        self._names = itertools.count()

    def __call__(self, task: Task) -> Answer:
        engine = self._live.engine
        engine.policy = self._live.served if task.adaptive else self._live.plain
        indices: dict[str, int] = {}
        watch = Watch(task)
        for index, prompt in enumerate(task.prompts):
            sampling = SamplingParams(
                temperature=task.temperature,
                top_p=task.top_p,
                seed=1000 * task.seed + index,
                max_tokens=task.num_tokens,
                ignore_eos=True,
            )
            name = str(next(self._names))
            indices[name] = index
            engine.add(Request(name, tuple(prompt), sampling))
        while engine.has_unfinished():
            watch.add([(indices[o.request_id], o.token_ids) for o in engine.step()])
        return watch.answer()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--kv-tokens", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    serve(claim_stdout(), partial(Decoder, parser.parse_args()))


if __name__ == "__main__":
    main()
