"""The seam between engine and ranks: the engine knows this protocol and nothing behind it."""

from typing import Protocol

from magicdec.batch import Batch, StepResult
from magicdec.config import EngineConfig
from magicdec.profiling.device_rates import RankDevice
from magicdec.runner import ModelRunner


class ExecutorError(RuntimeError):
    """A step failed and the ranks' state is unknown: the engine must not step again."""


class Executor(Protocol):
    """Runs one step on every rank. `num_blocks` is the smallest pool over the ranks."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def attention_backend(self) -> str: ...

    def measure_device(self) -> RankDevice:
        """What a rank runs on; the slowest of them, where they differ."""
        ...

    def execute(self, batch: Batch) -> StepResult:
        """Raises ExecutorError when a rank died or failed."""
        ...

    def shutdown(self) -> None: ...


class LocalExecutor:
    """One rank in this process."""

    def __init__(self, config: EngineConfig, runner: ModelRunner | None = None) -> None:
        """`runner`: of this config, over a model that is there already; None: it is loaded."""
        self._runner = runner or ModelRunner.load(config)
        self._runner.allocate_cache(self._runner.num_affordable_blocks())

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks

    @property
    def attention_backend(self) -> str:
        return self._runner.attention_backend

    def measure_device(self) -> RankDevice:
        return self._runner.measure_device()

    def execute(self, batch: Batch) -> StepResult:
        return self._runner.execute(batch)

    def shutdown(self) -> None:
        """Nothing to stop: the runner lives and dies with this object."""
