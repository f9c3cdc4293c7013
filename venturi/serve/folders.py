"""What lies in a model repository on disk: `<model>/config.pbtxt` and `<model>/<version>/model.*`, or one bare file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as pb

from venturi.core.log import logger
from venturi.serve.config import ModelConfig, backend_of, normalise, read_config
from venturi.serve.errors import invalid, not_found
from venturi.serve.models.base import ModelKind

BARE = (".onnx", ".vt")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its folder, or the file that is the model."""

    name: str
    path: Path

    @property
    def is_bare(self) -> bool:
        return self.path.is_file()

    def versions(self) -> dict[int, Path]:
        """Version number -> folder. Names that are not positive numbers without leading zeros are passed over."""
        if self.is_bare:
            return {1: self.path.parent}
        found = {}
        for child in sorted(self.path.iterdir()):
            if not child.is_dir() or child.name in ("configs", "warmup", "initial_state"):
                continue
            if child.name.isascii() and child.name.isdigit() and child.name[0] != "0":
                found[int(child.name)] = child
            else:
                logger.warning("model %s: folder %s is not a version number, it is passed over", self.name, child.name)
        return found

    def config(self, given: ModelConfig | None = None) -> ModelConfig:
        """As written: from `given`, else from config.pbtxt, else empty."""
        config = pb.ModelConfig()
        path = self.path / "config.pbtxt"
        if given is not None:
            config.CopyFrom(given)
        elif self.is_bare:
            config.default_model_filename = self.path.name
        elif path.is_file():
            config = read_config(path)
        return config

    def changed_ns(self) -> int:
        """The newest modification time below; for polling."""
        paths = [self.path] if self.is_bare else [self.path, *self.path.rglob("*")]
        return max((p.stat().st_mtime_ns for p in paths if p.exists()), default=0)


def stamp_of(folder: Path, config: ModelConfig) -> str:
    """A digest of the configuration and of the names, sizes and times of the files below `folder`."""
    digest = hashlib.blake2b(config.SerializeToString(deterministic=True), digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            about = path.stat()
            digest.update(f"\0{path.relative_to(folder)}\0{about.st_size}\0{about.st_mtime_ns}".encode())
    return digest.hexdigest()


def find_sources(roots: Sequence[Path]) -> dict[str, Source]:
    """Every model below the repositories. Raises ServeError when two have one name or a root is missing."""
    found: dict[str, Source] = {}
    for root in roots:
        for source in _sources_of(root):
            if source.name in found:
                raise invalid(f"model '{source.name}' is in two places: {found[source.name].path} and {source.path}")
            found[source.name] = source
    return found


def _sources_of(root: Path) -> list[Source]:
    if root.is_file():
        if root.suffix not in BARE:
            raise invalid(f"{root} is neither a repository folder nor one of {', '.join(BARE)}")
        return [Source(root.stem, root)]
    if not root.is_dir():
        raise not_found(f"model repository {root} does not exist")
    return [Source(p.name, p) for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def chosen_versions(config: ModelConfig, versions: dict[int, Path]) -> dict[int, Path]:
    """What the version policy serves. Raises ServeError when that is nothing."""
    policy = config.version_policy
    if policy.HasField("specific"):
        chosen = {v: versions[v] for v in policy.specific.versions if v in versions}
    elif policy.HasField("all"):
        chosen = dict(versions)
    else:
        chosen = {v: versions[v] for v in sorted(versions)[-policy.latest.num_versions :]}
    if not chosen:
        raise not_found(f"at least one version must be available under the version policy of model '{config.name}'")
    return chosen


def resolved_config(
    source: Source, kinds: dict[str, ModelKind], given: ModelConfig | None, *, complete: bool, default_max_batch: int
) -> tuple[ModelConfig, ModelKind]:
    """The configuration as the server uses it, completed from the newest version. Blocking: may open a model."""
    config = source.config(given)
    backend = backend_of(config, source.name)
    if backend not in kinds:
        raise invalid(f"model '{source.name}': models of kind '{backend}' are not supported yet")
    kind, versions = kinds[backend], source.versions()
    config.name = config.name or source.name
    if complete:
        kind.complete(config, versions[max(versions)] if versions else None, default_max_batch)
    return normalise(config, source.name, backend=backend), kind


def read_labels(source: Source, config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Lines of the label files that outputs name. Raises ServeError when one leaves the model's folder."""
    found = {}
    for output in config.output:
        if not output.label_filename:
            continue
        path = (source.path / output.label_filename).resolve()
        if source.path.resolve() not in path.parents:
            raise invalid(
                f"label_filename '{output.label_filename}' of model '{config.name}' leaves the model's folder"
            )
        try:
            found[output.name] = tuple(path.read_text().splitlines())
        except (OSError, UnicodeDecodeError) as exc:
            raise invalid(f"cannot read the labels of output '{output.name}' of model '{config.name}': {exc}") from exc
    return found
