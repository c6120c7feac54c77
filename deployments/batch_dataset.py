"""Rows through Ray Data: read in a stream, grouped, answered many at a time, out as each is done.

    read task (the driver's node)      row, row, ...           one block a row
      -> caller actors, num_live rows  Dispatcher or HTTP      one task a row
        -> the driver                  outcome, outcome, ...   in the order in which they end

One row a task is what makes a death cheap: Ray runs again the rows that a worker had and no other,
and an answer is the driver's as soon as it is there.
"""

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayError, RayTaskError

from magicdec.deployments.batch_answered import AnsweredIndex
from magicdec.deployments.batch_grouping import grouped
from magicdec.deployments.batch_outcome import Outcome
from magicdec.deployments.batch_output import JobStopped
from magicdec.deployments.batch_row import BatchRow, InputError, RowDefaults
from magicdec.deployments.batch_sources import Source

# Logical shares; unequal ones keep Ray Data from running both stages in one process.
READ_CPUS = 0.01
CALLER_CPUS = 0.02
NODE_LABEL = "ray.io/node-id"
INIT_DEATHS = 3  # of caller processes in turn, before the job is given up


@dataclass(frozen=True, slots=True)
class Stage:
    """Who answers: a callable class, what it is made with, and how many rows it has at a time."""

    caller: type
    target: Any
    num_callers: int
    num_live_rows: int  # over all callers


class RowDatasource(Datasource):
    """The rows that are not answered yet, by one task: the input is read once, and in order."""

    def __init__(
        self, source: Source, defaults: RowDefaults, answered: "ray.ObjectRef[AnsweredIndex]"
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = partial(_blocks, source, defaults, answered)

    def get_name(self) -> str:
        return "BatchRows"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(self._read, unknown)]


def outcomes(
    source: Source, defaults: RowDefaults, answered: AnsweredIndex, stage: Stage
) -> Iterator[Outcome]:
    """One a row that `answered` has not; a row may come twice where a worker died.

    Raises JobStopped.
    """
    with DataContext.current(_context()):  # the dataset keeps it
        answers = _answers(source, defaults, ray.put(answered), stage)
    with _ray_failures():
        batches = answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for batch in batches:
            table: Any = batch  # pyarrow has no types
            for outcome in table.column("outcome").to_pylist():
                yield pickle.loads(outcome)


def _answers(
    source: Source, defaults: RowDefaults, answered: "ray.ObjectRef[AnsweredIndex]", stage: Stage
) -> ray.data.Dataset:
    here = ray.get_runtime_context().get_node_id()  # local files are this node's
    rows = ray.data.read_datasource(
        RowDatasource(source, defaults, answered),
        override_num_blocks=1,
        num_cpus=READ_CPUS,
        label_selector={NODE_LABEL: here},
    )
    per_caller = max(1, stage.num_live_rows // stage.num_callers)
    answers: ray.data.Dataset = rows.map(
        stage.caller,
        fn_constructor_args=(stage.target, defaults),
        num_cpus=CALLER_CPUS,
        compute=ray.data.ActorPoolStrategy(
            size=stage.num_callers,
            max_tasks_in_flight_per_actor=per_caller,
            max_concurrent_calls_per_actor=per_caller,
        ),
    )
    return answers


@contextmanager
def _ray_failures() -> Iterator[None]:
    """What Ray could not mend by running it again, as JobStopped."""
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise JobStopped(" ".join(str(cause).split())) from error


def _context() -> DataContext:
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its bars are off
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # bytes: every row is a block of its own
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    context.execution_no_progress_timeout_s = -1  # a long answer is not a hang
    return context


def _blocks(
    source: Source, defaults: RowDefaults, answered: "ray.ObjectRef[AnsweredIndex]"
) -> Iterator[pa.Table]:
    """The same each time it is run: Ray runs it again where its worker dies, and takes up where
    that had been."""
    index = ray.get(answered)
    for row in grouped(_open_rows(source, defaults, index)):
        yield pa.table({"row": [pickle.dumps(row)]})


def _open_rows(
    source: Source, defaults: RowDefaults, answered: AnsweredIndex
) -> Iterator[BatchRow]:
    for row in source.rows(defaults.models):
        if isinstance(row, InputError):
            raise row  # it was read before without: somebody has changed it since
        if not answered.has(row.custom_id, row.key(defaults)):
            yield row
