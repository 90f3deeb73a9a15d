"""What makes ash.pyz one file: a finder that unpacks a group of bundled packages on the first import of one of them.

Everything Ash itself is stays importable from the zip; nothing is written, read or hashed before a bundled third-party name is
imported; if an earlier start has unpacked, Ash's own modules are taken from there with their bytecode. `_ash.table` is written
by build_pyz.py.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

from _ash.table import GROUPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.metadata import Distribution, DistributionFinder
    from types import ModuleType

_GROUP_OF = {name: group for group, about in GROUPS.items() for name in about["names"]}


def interpreter() -> str:
    """cp311, cp313t, …: what bytecode and compiled modules are for."""
    return "cp{}{}{}".format(*sys.version_info[:2], "t" if "t" in sys.abiflags else "")


class BundleError(ImportError):
    """A bundled package cannot be made importable here; the message says why and what to do."""


class _Unpacker:
    """Loader of a name whose group is not unpacked yet: only importing unpacks, asking whether the name exists does not."""

    def __init__(self, finder: BundleFinder, group: str) -> None:
        self._finder, self._group = finder, group

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        self._finder.open(self._group)
        real = self._finder.find_spec(spec.name)
        if real is None or real.loader is None:
            raise BundleError(f"{spec.name} is missing in {self._finder.archive}; build it again")
        vars(spec).update(vars(real))
        return real.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        raise BundleError(f"{module.__name__} was not unpacked")  # create_module has put the real loader in place


class BundleFinder:
    """Stands before sys.path for the bundled names only, so that no other version on this machine is ever mixed in."""

    def __init__(self, archive: str) -> None:
        self.archive = archive
        self.paths: list[str] = []
        self.extensions: dict[str, str] = {}
        self._opened: set[str] = set()
        self._lock: Any = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        group = _GROUP_OF.get(name)
        if group is not None and group not in self._opened:
            return ModuleSpec(name, _Unpacker(self, group))  # type: ignore[arg-type]  # it becomes the real loader
        file = self.extensions.get(name)
        if file is not None:
            spec = ModuleSpec(name, ExtensionFileLoader(name, file), origin=file)
            spec.has_location = True
            return spec
        return None if group is None else PathFinder.find_spec(name, self.paths)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """Metadata and entry points of the groups in use (opentelemetry finds its own parts through them)."""
        from importlib.metadata import DistributionFinder, MetadataPathFinder

        name = context.name if context else None
        return MetadataPathFinder.find_distributions(DistributionFinder.Context(name=name, path=self.paths))

    def invalidate_caches(self) -> None:
        """Nothing to forget: an unpacked folder never changes."""

    def open(self, group: str) -> None:
        """Make `group` importable. Threads that import at the same time wait for the one that unpacks."""
        if group in self._opened:
            return
        with self._lock:
            if group not in self._opened:
                from _ash import unpack

                opened = unpack.open_group(self.archive, group)
                self.extensions.update(opened.extensions)
                self.paths.extend(opened.paths)
                self._prefer_compiled_ash()
                self._opened.add(group)

    def _prefer_compiled_ash(self) -> None:
        """From now on Ash's own modules come with their bytecode; what is loaded already stays."""
        if "ash" in self._opened:
            return
        import ash
        from _ash import unpack

        self._opened.add("ash")
        ash.__path__.insert(0, os.path.join(unpack.open_group(self.archive, "ash").paths[0], "ash"))

    def use_ready_ash(self, library: str | None) -> None:
        """Import Ash itself from `library`, if there is one, from the first module on."""
        if library is not None:
            sys.path.insert(0, library)
            self._opened.add("ash")

    def install(self) -> None:
        from _thread import RLock

        self._lock = RLock()
        sys.meta_path.insert(0, self)


def install() -> BundleFinder:
    """Make every bundled package importable in this process; unpacks nothing yet."""
    for finder in sys.meta_path:
        if isinstance(finder, BundleFinder):
            return finder
    finder = BundleFinder(os.path.abspath(__loader__.archive))  # type: ignore[name-defined]  # a zipimporter
    finder.install()
    return finder


def _ready_ash() -> str | None:
    """Path of Ash's own modules with bytecode, when an earlier start left them where `ash.cache` looks first.

    Compiling its modules is a third of the time of a client command. This repeats that module's rules in the few lines that are
    quicker than loading it; whatever does not fit is left to the next server start, which repairs it.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    root = os.path.abspath(os.path.expanduser(os.environ.get("ASH_CACHE_DIR") or os.path.join(base, "ash")))
    folder = os.path.join(root, f"ash-{interpreter()}-any-{GROUPS['ash']['digest']}")
    try:
        about = os.stat(root)
        if about.st_uid not in (os.geteuid(), 0) or about.st_mode & 0o022:
            return None
        manifest = os.open(os.path.join(folder, "manifest"), os.O_RDONLY)
    except OSError:
        return None
    library = os.path.join(folder, "lib.zip")
    if _lock_if_whole(manifest, library):
        return library  # the descriptor stays open: prune leaves alone what is locked
    os.close(manifest)
    return None


def _lock_if_whole(manifest: int, library: str) -> bool:
    from fcntl import LOCK_NB, LOCK_SH, flock
    from zlib import crc32

    try:
        flock(manifest, LOCK_SH | LOCK_NB)
        with open(library, "rb", buffering=0) as file:
            return b"# crc32 %08x\n" % crc32(file.read()) in os.read(manifest, 4096)
    except OSError:
        return False


def run() -> None:
    """`python ash.pyz …`: hand over to the command line."""
    finder = install()
    sys.path[0] = finder.archive  # it may be relative, and a later chdir must not break imports
    if len(sys.argv) > 1 and sys.argv[1] not in ("--help", "-h"):
        finder.use_ready_ash(_ready_ash())
    from ash.__main__ import main

    try:
        code = main()
    except BundleError as error:
        sys.exit(f"ash: {error}")
    sys.exit(code)
