"""What passes between the ingress and a replica beside the request and its outputs.

Light on purpose: the ingress, the router and the command line import it without torch.
"""

from dataclasses import dataclass

from magicdec.stats import EngineLoad


class EngineDied(RuntimeError):
    """The engine failed while this request was live in it: resume it elsewhere."""


class EngineUnavailable(RuntimeError):
    """The engine has stopped, or had failed before this request reached it: no death, resume it."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The first item of every stream: which replica has the request."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class ReplicaDescription:
    """What start-up prints of one replica, and what the ingress needs to check prompts."""

    replica_id: str
    pid: int
    attention_backend: str
    num_ranks: int
    kv_capacity_tokens: int
    max_model_len: int  # tokens, prompt and output
    vocab_size: int
    load: EngineLoad
