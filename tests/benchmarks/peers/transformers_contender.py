"""transformers' `generate` as a contender: SDPA attention, K/V of the prompts kept."""

import argparse
import copy
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    set_seed,
)

from tests.benchmarks.peers.contest import Answer, Task, Watch, claim_stdout, serve


class _Steps(LogitsProcessor):
    """Tells the watch of each step's tokens when the next step begins to choose."""

    def __init__(self, watch: Watch, num_prompt_tokens: int) -> None:
        self._watch = watch
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] > self._num_prompt_tokens:
            self.add(input_ids)
        return scores

    def add(self, input_ids: torch.Tensor) -> None:
        """The last column is what the step gave."""
        self._watch.add([(i, [token]) for i, token in enumerate(input_ids[:, -1].tolist())])


class Decoder:
    def __init__(self, model: str, dtype: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._model.generation_config = GenerationConfig()  # no end-of-text token ends an answer
        self._prompts: list[list[int]] = []
        self._cache = DynamicCache()

    @torch.inference_mode()
    def __call__(self, task: Task) -> Answer:
        length = len(task.prompts[0])
        cache = DynamicCache()
        if task.prompts == self._prompts:
            cache = copy.deepcopy(self._cache)
        config = GenerationConfig(max_new_tokens=task.num_tokens)
        if task.temperature > 0:
            config.do_sample, config.top_k = True, 0
            config.temperature, config.top_p = task.temperature, task.top_p
        set_seed(task.seed)
        prompts = torch.tensor(task.prompts)
        watch = Watch(task)
        steps = _Steps(watch, length)
        found = self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            past_key_values=cache,
            generation_config=config,
            logits_processor=LogitsProcessorList([steps]),
        )
        assert isinstance(found, torch.Tensor)
        steps.add(found)
        if task.prompts != self._prompts:
            cache.crop(-task.num_tokens)  # generate needs one token to begin with
            self._prompts, self._cache = task.prompts, cache
        return watch.answer()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    args = parser.parse_args()
    serve(claim_stdout(), partial(Decoder, args.model, args.dtype))


if __name__ == "__main__":
    main()
