"""Real executors that are disturbed, and engines and requests over them."""

import threading

from magicdec.batch import Batch, StepResult
from magicdec.config import EngineConfig
from magicdec.deployments.engine_loop import EngineLoop
from magicdec.engine import Engine
from magicdec.executor import Executor, ExecutorError, LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.profiling.device_rates import RankDevice
from magicdec.types import Request, RequestOutput, SamplingParams


class WrappedExecutor:
    """A real executor, for what follows to disturb."""

    def __init__(self, inner: LocalExecutor) -> None:
        self._inner = inner

    @property
    def num_blocks(self) -> int:
        return self._inner.num_blocks

    @property
    def attention_backend(self) -> str:
        return self._inner.attention_backend

    def measure_device(self) -> RankDevice:
        return self._inner.measure_device()

    def execute(self, batch: Batch) -> StepResult:
        return self._inner.execute(batch)

    def shutdown(self) -> None:
        self._inner.shutdown()


class FailingExecutor(WrappedExecutor):
    """One whose ranks die at a given step."""

    def __init__(self, inner: LocalExecutor, fails_at: int) -> None:
        super().__init__(inner)
        self._steps_left = fails_at

    def execute(self, batch: Batch) -> StepResult:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise ExecutorError("a rank died")
        return super().execute(batch)


class HeldExecutor(WrappedExecutor):
    """One whose steps end only once `release` is set."""

    def __init__(self, inner: LocalExecutor) -> None:
        super().__init__(inner)
        self.entered = threading.Event()
        self.release = threading.Event()

    def execute(self, batch: Batch) -> StepResult:
        self.entered.set()
        self.release.wait(timeout=10)
        return super().execute(batch)


def request(name: str, max_tokens: int = 20, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(name, prompt, sampling)


def ignore(error: BaseException) -> None:
    """No test that uses it expects a fatal error."""
    raise AssertionError("unexpected") from error


def engine_over(executor: Executor, config: EngineConfig) -> Engine:
    path = config.model.path
    return Engine(config, executor, load_tokenizer(path), read_model_facts(path))


async def collect(loop: EngineLoop, wanted: Request) -> list[RequestOutput]:
    return [output async for output in loop.stream(wanted)]
