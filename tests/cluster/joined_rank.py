"""A process of its own as one rank on this machine, without Ray."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from magicdec.cluster.placement import Rendezvous


@contextmanager
def joined_rank(rank: int, num_ranks: int, port: int) -> Iterator[None]:
    """Joins the ranks that meet at `port`, and leaves them once all are done.

    A process that exits without leaving races its own gloo threads: one in some 75 aborts
    ("terminate called without an active exception").
    """
    rendezvous = Rendezvous(rank, num_ranks, "127.0.0.1", port, use_gpu=False)
    os.environ.update(rendezvous.environment())
    # Imported only now: DeepSpeed reads that environment.
    from magicdec.cluster.tensor_parallel import join_process_group

    torch.set_num_threads(1)
    join_process_group(rendezvous)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
