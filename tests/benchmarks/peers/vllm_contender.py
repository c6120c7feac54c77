"""vLLM as a contender; runs in its own environment, without this project."""

import argparse
from functools import partial
from typing import Any

from tests.benchmarks.peers.contest import Answer, Task, Watch, claim_stdout, serve

_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}


class Decoder:
    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM

        llm = LLM(
            args.model,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            enable_prefix_caching=True,
            speculative_config=_NGRAM if args.ngram else None,
        )
        self._engine: Any = llm.llm_engine
        self._num_tasks = 0

    def __call__(self, task: Task) -> Answer:
        from vllm import SamplingParams

        self._num_tasks += 1
        watch = Watch(task)
        for index, prompt in enumerate(task.prompts):
            sampling = SamplingParams(
                temperature=task.temperature,
                top_p=task.top_p,
                seed=None if task.temperature == 0 else 1000 * task.seed + index,
                max_tokens=task.num_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            name = f"{index}-{self._num_tasks}"
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        so_far = [0] * len(task.prompts)
        while self._engine.has_unfinished_requests():
            new = []
            for output in self._engine.step():
                index = int(output.request_id.partition("-")[0])
                token_ids = list(output.outputs[0].token_ids)
                new.append((index, token_ids[so_far[index] :]))
                so_far[index] = len(token_ids)
            watch.add(new)
        return watch.answer()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--ngram", action="store_true")
    args = parser.parse_args()
    serve(claim_stdout(), partial(Decoder, args))


if __name__ == "__main__":
    main()
