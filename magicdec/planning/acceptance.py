"""How many drafted tokens are expected to be accepted where nobody has measured: by the paper.

    logit = 1.45 + drafter + 0.22 * log2(budget / 512) - 0.07 * log2(context / 32768)

Level, budget and context are those of Llama-3.1-8B on PG-19 (MagicDec, arXiv 2408.11049):
streaming over 512 positions has .84 at 4K, .81 at 32K and .79 at 100K (the authors' blog), snapkv
over 2,049 has .89 at 32K (Table 6). What `recycled` adds to `streaming` is SmolLM2-135M's
(docs/acceptance.md), a draft model's figure that of Llama-3.2-1B for 3.1-8B (Table 6), and that of
`ngram` what yields the 1.2 tokens a round measured on sampled text.

The engine starts from higher figures, SmolLM2's, and corrects them as it serves; a plan has nothing
to correct it, so it takes the lower ones.
"""

import math

_LEVEL = 1.45  # streaming, 512 positions, 32,768 tokens
_VIEW_LOGITS = {"streaming": 0.0, "snapkv": 0.2, "recycled": 0.45}
_PER_BUDGET_DOUBLING = 0.22
_PER_CONTEXT_DOUBLING = -0.07
_FLAT = {"draft_model": 0.67, "ngram": 0.16}


def default_acceptance(drafter: str, draft_budget: float, context_len: float) -> float:
    """Of one drafted token, given that those before it were accepted.

    Raises KeyError for a drafter that is not known.
    """
    if drafter in _FLAT:
        return _FLAT[drafter]
    logit = (
        _LEVEL
        + _VIEW_LOGITS[drafter]
        + _PER_BUDGET_DOUBLING * math.log2(draft_budget / 512)
        + _PER_CONTEXT_DOUBLING * math.log2(context_len / 32768)
    )
    return 1.0 / (1.0 + math.exp(-logit))
