"""Writing files so that a killed run leaves nothing half-written."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = 48


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` on success, else remove it.

    The temporary file lies in the same folder, so the rename is atomic and ``path`` may be a
    file that is still being read. An existing file keeps its permissions and a symbolic link stays
    one. A device or named pipe is yielded itself: renaming would replace ``/dev/null`` by a file.
    Raises ``OSError`` as the file system does.
    """
    given = Path(path)
    if given.exists() and not given.is_file():
        yield given
        return
    target = Path(os.path.realpath(given))
    # Cut, so that a name of the greatest length still has one of its own for the temporary file.
    prefix = f".{target.name[:_PREFIX]}."
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_permissions(target))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _permissions(target: Path) -> int:
    """Return those of the file that is replaced, else those that a plain open() would give."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
