"""What a person sees of a batch: a bar on a terminal, plain lines elsewhere, a table at the end."""

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from magicdec.deployments.batch_output import RowResult

LINE_PERIOD_S = 10.0
ABSENT = "-"


@dataclass(slots=True)
class Figures:
    """Counted over this run alone, but for `num_answered`: the rows that were there before."""

    num_rows: int
    num_answered: int = 0
    num_done: int = 0
    num_errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_rounds: int = 0
    num_accepted_tokens: int = 0
    seconds: float = 0.0  # since the engines were ready

    def add(self, result: RowResult) -> None:
        self.num_done += 1
        self.num_errors += result.error is not None
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        self.num_rounds += result.num_rounds
        self.num_accepted_tokens += result.num_accepted_tokens

    @property
    def num_left(self) -> int:
        return self.num_rows - self.num_answered - self.num_done

    @property
    def tokens_per_second(self) -> float | None:
        return self.completion_tokens / self.seconds if self.seconds > 0 else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens a round, the recovered or bonus token included; None: no rounds were told."""
        if not self.num_rounds:
            return None
        return 1.0 + self.num_accepted_tokens / self.num_rounds

    @property
    def seconds_left(self) -> float | None:
        """By the rows of this run; None before the first."""
        return self.seconds / self.num_done * self.num_left if self.num_done else None

    def line(self) -> str:
        rate, acceptance = self.tokens_per_second, self.mean_acceptance_length
        parts = [
            f"{self.num_answered + self.num_done:,}/{self.num_rows:,} rows",
            f"{self.num_errors:,} errors" if self.num_errors else "",
            "" if rate is None else f"{rate:,.1f} tokens/s",
            "" if acceptance is None else f"{acceptance:.2f} tokens a round",
            "" if self.seconds_left is None else f"{duration(self.seconds_left)} left",
        ]
        return ", ".join(part for part in parts if part)


class ProgressView:
    """`add` after each row. A terminal gets a bar, anything else a line every ten seconds."""

    def __init__(self, console: Console, figures: Figures) -> None:
        self._console = console
        self._figures = figures
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "ProgressView":
        if self._console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            figures = self._figures
            self._task = self._bar.add_task(
                figures.line(), total=figures.num_rows, completed=figures.num_answered
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, result: RowResult) -> None:
        figures, now = self._figures, time.monotonic()
        figures.add(result)
        figures.seconds = now - self._started
        if self._bar is not None and self._task is not None:
            done = figures.num_answered + figures.num_done
            self._bar.update(self._task, completed=done, description=figures.line())
        elif now - self._printed >= LINE_PERIOD_S:
            self._console.print(figures.line(), highlight=False)
            self._printed = now


def summary_table(figures: Figures, output: str, num_errors: int) -> Table:
    """`num_errors`: in the whole output, earlier runs' included."""
    rate, acceptance = figures.tokens_per_second, figures.mean_acceptance_length
    rows = {
        "rows": f"{figures.num_rows:,}",
        "answered before": f"{figures.num_answered:,}",
        "answered now": f"{figures.num_done - figures.num_errors:,}",
        "errors": f"{num_errors:,} in the output, {figures.num_errors:,} of this run",
        "left": f"{figures.num_left:,}",
        "tokens": f"{figures.prompt_tokens:,} in, {figures.completion_tokens:,} out",
        "time": duration(figures.seconds),
        "rate": ABSENT if rate is None else f"{rate:,.1f} tokens/s",
        "acceptance": ABSENT if acceptance is None else f"{acceptance:.2f} tokens a round",
        "output": output,
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
