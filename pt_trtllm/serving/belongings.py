"""Everything that is a server's beside its own process, and how nothing of it stays, also after SIGKILL.

A private folder names the rest: every process that the server started has it in its environment, and every piece of
shared memory has the folder's name. Who holds the folder's lock is using it, so what a server left that crashed can
be told from what another one needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time
from pathlib import Path

from pt_trtllm import env
from pt_trtllm.processes import end_processes, with_environment

FOLDER_PREFIX, LOCK, TEMPORARY = "pt-triton-", "lock", "tmp"
SHARED_MEMORY = Path("/dev/shm")
SHORT_PLACE, MAX_PLACE = Path("/tmp"), 60
"""The kernel takes 107 characters for a socket's path, and Open MPI's are further below than Triton's."""
SWEEP_S = 60.0
"""For processes to be gone; those that the kernel itself holds cannot be ended."""


class Belongings:
    lock: int
    """A descriptor; of one's own belongings only, until they are released."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shm_prefix = f"pt-{folder.name.removeprefix(FOLDER_PREFIX)}-"
        """Of shared memory's names in Triton's Python backend."""
        self._mpi_shm = SHARED_MEMORY / f"{self.shm_prefix}mpi"

    @classmethod
    def new(cls) -> Belongings:
        """With its lock held, by this process and those that it is handed to."""
        made = cls(Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_place())))
        made.lock = os.open(made.folder / f".{LOCK}", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(made.lock, fcntl.LOCK_EX)
        (made.folder / f".{LOCK}").rename(made.folder / LOCK)  # nobody sees it without its owner
        (made.folder / TEMPORARY).mkdir(mode=0o700)
        made._mpi_shm.mkdir(mode=0o700)
        return made

    def release(self) -> None:
        """This process's hold on the lock; another one that has it keeps it."""
        if self.lock >= 0:
            os.close(self.lock)
        self.lock = -1

    def environment(self) -> dict[str, str]:
        """For the server: what makes its processes and their files be found."""
        return {
            env.TRITON_CONTROL_DIR.name: str(self.folder),
            env.SHARED_MEMORY_DIR.name: str(self._mpi_shm),
            "TMPDIR": str(self.folder / TEMPORARY),
        }

    def sweep(self, besides: frozenset[int] = frozenset()) -> None:
        """Ends every process and removes every file; `besides` are processes that are the server's too."""
        mark, give_up = f"{env.TRITON_CONTROL_DIR.name}={self.folder}", time.monotonic() + SWEEP_S
        end_processes(set(besides) | with_environment(mark))
        while (left := with_environment(mark)) and time.monotonic() < give_up:  # started meanwhile
            end_processes(left, grace_s=0.0)
        for path in SHARED_MEMORY.glob(f"{glob.escape(self.shm_prefix)}*"):
            _remove(path)
        _remove(self.folder)


def sweep_crashed() -> None:
    """Removes what servers of this user left behind that were killed together with their guardians."""
    for folder in _place().glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # it has an owner, is another's, or gone
            # Opened once, and then judged: a name in this place may mean another folder from one look to the next.
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, place)
            if os.fstat(place).st_uid != os.getuid():
                continue
            lock = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW, dir_fd=place)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Belongings(folder).sweep()


def _place() -> Path:
    """For private folders: that of temporary files, where sockets below it can have a name."""
    usual = Path(tempfile.gettempdir())
    return usual if len(os.fsencode(usual)) <= MAX_PLACE else SHORT_PLACE


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.lstat().st_uid != os.getuid():
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
