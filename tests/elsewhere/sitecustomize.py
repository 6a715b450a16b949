"""Makes this system lack what Windows lacks, in a process that has this folder on its path.

Modules, constants and functions are taken away; a folder cannot be opened; the event loop has no
`add_signal_handler`.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile  # noqa: F401 - it reads some of these names when it is imported

GONE: dict[object, str] = {
    os: "O_NONBLOCK O_CLOEXEC O_DIRECTORY O_NOFOLLOW getuid geteuid getgid fchown chown fchmod"
    " statvfs sysconf fork killpg setsid mkfifo",
    signal: "SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGALRM",
    socket: "TCP_INFO TCP_USER_TIMEOUT SO_REUSEPORT MSG_DONTWAIT",
    asyncio.SelectorEventLoop: "add_signal_handler",
}
for place, names in GONE.items():
    for name in names.split():
        with contextlib.suppress(AttributeError):
            delattr(place, name)
for module in ("fcntl", "termios", "resource", "pwd", "grp"):
    sys.modules[module] = None  # type: ignore[assignment]  # its import fails

_open = os.open


def _open_files_only(path, *arguments, **more):  # type: ignore[no-untyped-def]
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied")
    return _open(path, *arguments, **more)


os.open = _open_files_only
