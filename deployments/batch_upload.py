"""An output at a URL: written on this machine, uploaded whole when the run ends.

Object stores have no append. The local copy is kept until it is uploaded, so that a run that was
killed is gone on with on the same machine; one that ended in order can be gone on with anywhere.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from magicdec.deployments.batch_answered import OutputError
from magicdec.deployments.batch_files import file_system, is_url, local_path, reading
from magicdec.deployments.batch_manifest import manifest_path
from magicdec.deployments.batch_output import JobStopped
from magicdec.deployments.cache_folder import cache_folder


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """`url` is what the user named, `path` the file that is written; `is_staged`: another one."""

    url: str
    path: Path
    is_staged: bool

    @classmethod
    def of(cls, url: str) -> "OutputPlace":
        if not is_url(url):
            return cls(url, local_path(url), False)
        name = blake2b(url.encode(), digest_size=8).hexdigest()
        return cls(url, cache_folder() / "batch" / f"{name}-{url.rpartition('/')[2]}", True)

    @contextmanager
    def staged(self) -> Iterator[None]:
        """The local copy while the block runs; what it left is uploaded, however it ended.

        Raises SettingsError and OutputError before, JobStopped after.
        """
        if not self.is_staged:
            yield
            return
        self._fetch()
        try:
            yield
        finally:
            self._upload()

    def _fetch(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        system, name = file_system(self.url)
        with reading(self.url):
            there = system.size(name) if system.exists(name) else None
        if self.path.exists() and self.path.stat().st_size > 0:
            if there is not None and there > self.path.stat().st_size:
                raise OutputError(
                    f"{self.url} has more than {self.path}, which a killed run of this machine "
                    "left: remove one of them"
                )
            return
        if there is None:
            return
        for remote, local in self._copies(name):
            with reading(self.url):
                if system.exists(remote):
                    system.get_file(remote, str(local))

    def _upload(self) -> None:
        """Both files, the output last; then the local ones go."""
        if not self.path.exists():
            return
        system, name = file_system(self.url)
        copies = self._copies(name)
        try:
            for remote, local in reversed(copies):
                system.put_file(str(local), remote)
        except OSError as error:
            raise JobStopped(
                f"cannot write {self.url}: {error}; the output is in {self.path}, and the same "
                "command tries again"
            ) from error
        for _, local in copies:
            os.unlink(local)

    def _copies(self, name: str) -> list[tuple[str, Path]]:
        manifest = manifest_path(self.path)
        return [(name, self.path), (f"{name}.manifest.json", manifest)]
