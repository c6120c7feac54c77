"""The language-model head, kept out of AutoTP and split by vocabulary.

AutoTP would split it by the hidden dimension and all-reduce the logits of the whole vocabulary.
Here a rank multiplies with its own rows alone and keeps its own logits; `magicdec.vocabulary` says
what ranks then tell one another.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from magicdec.attention import UnsupportedModel
from magicdec.vocabulary import Vocabulary, even_bounds


def find_head(module: nn.Module) -> tuple[str, nn.Linear]:
    """The name and the module that makes the logits. Raises UnsupportedModel without one."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise UnsupportedModel(
            f"{type(module).__name__}: the output head is a {type(head).__name__}, "
            "and only an nn.Linear can be split by vocabulary"
        )
    return next(name for name, child in module.named_modules() if child is head), head


@dataclass(frozen=True, slots=True)
class SplitHead:
    """A head that was taken out of its model, and which of its rows this rank will hold."""

    name: str
    whole: nn.Linear  # as transformers made it
    tied_to: str | None  # the parameter, the embedding's, whose rows it uses
    vocabulary: Vocabulary

    @classmethod
    def detach(cls, module: nn.Module, num_ranks: int, rank: int) -> "SplitHead":
        """Leaves a placeholder that AutoTP passes over."""
        name, head = find_head(module)
        vocabulary = Vocabulary(even_bounds(head.out_features, num_ranks), rank, all_gather)
        tied_to = module.all_tied_weights_keys.get(f"{name}.weight")  # type: ignore[operator, union-attr]
        module.set_submodule(name, nn.Identity())
        return cls(name, head, tied_to, vocabulary)

    def attach(self, module: nn.Module) -> None:
        """Puts this rank's rows in the placeholder's place: those of the embedding itself where
        the two are tied, copies otherwise, without values while the whole head has none."""
        device = next(module.parameters()).device
        rows = slice(self.vocabulary.start, self.vocabulary.stop)
        whole = self.whole
        own = nn.Linear(
            whole.in_features, rows.stop - rows.start, whole.bias is not None, device="meta"
        )
        if self.tied_to is None:
            own.weight = _copy(whole.weight[rows], device)
        else:
            tied = module.get_parameter(self.tied_to)
            own.weight = nn.Parameter(tied.detach()[rows], requires_grad=False)
        if whole.bias is not None:
            own.bias = _copy(whole.bias[rows], device)
        module.set_submodule(self.name, own)


def _copy(part: torch.Tensor, device: torch.device) -> nn.Parameter:
    copy = torch.empty(part.shape, dtype=part.dtype, device=device)
    if not part.is_meta:
        copy.copy_(part.detach())
    return nn.Parameter(copy, requires_grad=False)


def all_gather(part: torch.Tensor) -> torch.Tensor:
    """See magicdec.vocabulary.AllGather: over the ranks of the process group, on its device."""
    num_ranks = dist.get_world_size()
    gathered = part.new_empty(num_ranks * part.numel())
    dist.all_gather_into_tensor(gathered, part.contiguous().view(-1))
    return gathered.view(num_ranks, *part.shape)
