"""Processes of a test's own Ray session."""

import psutil


def live_ranks() -> list[psutil.Process]:
    """The rank actors among this process's descendants; any of them may end at any moment."""
    ranks = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ShardWorker" in " ".join(process.cmdline()):
                ranks.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return ranks
