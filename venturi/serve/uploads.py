"""Models that come with the request to load them: their files in a folder of the server's, until they are unloaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from venturi.serve.errors import invalid
from venturi.serve.folders import Source


class Uploads:
    """One folder a model; a newer upload replaces the older one's files when it has been written."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._sources: dict[str, Source] = {}

    def write(self, name: str, files: Mapping[str, bytes]) -> Source:
        """`files`: "<version>/<file>" -> content. Raises ServeError for paths that leave the model's folder."""
        if not files:
            raise invalid(f"no files are given for model '{name}'")
        if self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix="venturi-uploads-"))
        folder = Path(tempfile.mkdtemp(dir=self._root))
        try:
            for path, content in files.items():
                target = folder / _checked(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Source(name, folder)

    def keep(self, source: Source) -> None:
        """The upload is in service: later loads of the name without files take it."""
        old = self._sources.get(source.name)
        self._sources[source.name] = source
        if old is not None:
            self.drop(old)

    def drop(self, source: Source) -> None:
        shutil.rmtree(source.path, ignore_errors=True)

    def sources(self) -> dict[str, Source]:
        return dict(self._sources)

    def forget(self, name: str) -> None:
        """The model is unloaded: its files go."""
        source = self._sources.pop(name, None)
        if source is not None:
            self.drop(source)

    def close(self) -> None:
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)


def _checked(path: str) -> PurePosixPath:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise invalid(f"file path {path!r} leaves the model's folder")
    return PurePosixPath(*parts)
