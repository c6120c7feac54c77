"""Two real ranks run the largest step together, and each says what its own memory has left."""

import socket
import subprocess
import sys
from pathlib import Path

from magicdec.config import MEMORY_SHARE
from magicdec.profiling.memory_profile import GIB, GRAPHS_BYTES
from tests.cluster.shard_models import SHARDABLE
from tests.conftest import save_model

ROOT = Path(__file__).parents[2]
TOTALS = (2 * GIB, 3 * GIB)


def test_every_rank_profiles_its_own_memory(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", SHARDABLE["llama"]())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.cluster.memory_process"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(len(TOTALS)), port, str(total), str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, total in enumerate(TOTALS)
    ]
    block_bytes = 8 * 4 * 2 * 2 * 32 * 4  # tokens, layers, K and V, a rank's KV heads, dims, fp32
    for rank, total in zip(ranks, TOTALS, strict=True):
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0
        left = int(MEMORY_SHARE * total) - 1000 - GRAPHS_BYTES
        assert output.split()[-2:] == ["blocks", str(left // block_bytes)]
