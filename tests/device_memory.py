"""A device's memory that is made up: what a largest step takes there is said beforehand."""

from dataclasses import dataclass


@dataclass
class FakeMemory:
    """Implements magicdec.profiling.memory_profile.DeviceMemory; bytes.

    `step` is what a step holds at its peak beside the weights, the cache that it runs over
    included, and `workspace` what of that stays; `outside` is the runtime's and other processes'.
    """

    total_bytes: int
    weights: int = 1000
    step: int = 0
    workspace: int = 0
    outside: int = 0
    num_trims: int = 0

    def total(self) -> int:
        return self.total_bytes

    def free(self) -> int:
        return self.total_bytes - self.outside - self.held()

    def held(self) -> int:
        return self.weights + (self.workspace if self.num_trims > 1 else 0)

    def most_held(self) -> int:
        return self.weights + self.step

    def trim(self) -> None:
        self.num_trims += 1
