"""The command line of `keystore.py`: make keys and salts, and change key files safely."""

import argparse
import contextlib
import errno
import os
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from access.credentials import new_key, salted_digest
from access.keyfile import BOM, parse, read_file, read_lines, reason, split_line
from access.rights import parse_options
from settings import SettingsError, load

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_LOCKED = 10.0  # seconds that another process may take to change a key file
RETRY_INTERVAL = 0.05  # seconds
_HOW_TO_WRITE = (
    "; in a container, mount its folder writable for this command alone, as in"
    " docker compose run --rm -v ./keys:/app/keys ollprox keys add --label Mary"
)


def _line(key: bytes, options: Iterable[bytes], label: bytes) -> bytes:
    return b" ".join([key, *options]) + (b"  # " + label if label else b"")


class Failure(Exception):
    """A command failed; the message is the one line to show."""

    status = 1  # exit status of the process


class Misuse(Failure):
    """The arguments or settings are wrong."""

    status = 2


class Tool:
    """The commands: one method each, with the command's name.

    Args:
        chosen: the parsed arguments.
        salt: of the digests; empty if the file holds plain keys.
        path: of the key file, if the arguments name none.

    """

    def __init__(self, chosen: argparse.Namespace, salt: bytes, path: Path) -> None:
        self._chosen = chosen
        self._salt = salt
        self._path = path

    def new(self) -> None:
        """Print a new key and its line."""
        key, line = self._make()
        print(f"API key, for its user:          {key}")
        print(f"line to append to the key file: {line.decode(errors='surrogateescape')}")

    def add(self) -> None:
        """Append a new key to the key file."""
        key, line = self._make()
        path = self._file()
        if not self._chosen.file:
            path.parent.mkdir(exist_ok=True)

        def append(text: bytes) -> bytes:
            text += b"" if text[-1:] in b"\r\n" else b"\n"
            return text + line + b"\n"

        change_file(path, append)
        print(f"API key, for its user: {key}")
        print(f"its line was added to {path}")

    def list(self) -> None:
        """Print labels and options, and to standard error what is wrong with lines."""
        path = self._file()
        parsed = parse(read_file(path)[0], self._salt, digests=bool(self._salt))
        now = time.time()
        for key in parsed.keys.values():
            label = "".join(c if c.isprintable() else "?" for c in key.label) or "(no label)"
            rights = " ".join(f"{name}={value}" if value else name for name, value in key.rights())
            expired = " (expired)" if key.until is not None and key.until <= now else ""
            print(f"{label:<24} {rights}{expired}".rstrip())
        for report in parsed.reports:
            print(report, file=sys.stderr)

    def revoke(self) -> None:
        """Remove all keys of a label from the key file, with every line they are on."""
        path, label = self._file(), _label(self._chosen.label)
        if not label:
            raise Misuse("name a label; remove a key without one from the file by hand")
        removed: set[int] = set()

        def remove(text: bytes) -> bytes:
            lines = [*read_lines(text, self._salt, digests=bool(self._salt))]
            named = [line for line in lines if line.label == label]
            digests = {line.digest for line in named} - {None}
            removed.update(line.number for line in named)
            removed.update(line.number for line in lines if line.digest in digests)
            if not removed:
                raise Failure(f"no line of {path} has this label; `list` shows those there are")
            kept = text.splitlines(keepends=True)
            return b"".join(line for n, line in enumerate(kept, 1) if n not in removed)

        change_file(path, remove)
        print(f"{len(removed)} line{'s' * (len(removed) > 1)} removed from {path}")

    def hash(self) -> None:
        """Convert plain keys on standard input to lines with digests."""
        if not self._salt:
            raise Misuse(
                "API_KEY_SALT is not set: put API_KEY_SALT=, and what `salt` prints, in .env"
            )
        text = sys.stdin.buffer.read()
        lines = {line.number: line for line in read_lines(text, self._salt, digests=False)}
        written = []
        for number, raw in enumerate(text.removeprefix(BOM).splitlines(), 1):
            key, options, label = split_line(raw)
            if number in lines and lines[number].looks_salted:
                print(f"line {number} is a digest already: left as it is", file=sys.stderr)
            elif number in lines:
                if lines[number].fault:
                    raise Failure(f"line {number} {lines[number].fault}")
                raw = _line(salted_digest(self._salt, key).hex().encode(), options, label)
            written.append(raw + b"\n")
        sys.stdout.buffer.write(b"".join(written))  # only if no line has a fault

    def salt(self) -> None:
        """Print a new salt."""
        print(secrets.token_hex(16))

    def _make(self) -> tuple[str, bytes]:
        """Return a new key and its line."""
        options = self._chosen.options.split()
        try:
            parse_options(options)
        except ValueError as error:
            raise Misuse(f"--options: {error}") from None
        key = new_key()
        word = salted_digest(self._salt, key.encode()).hex() if self._salt else key
        return key, _line(word.encode(), map(str.encode, options), _label(self._chosen.label))

    def _file(self) -> Path:
        return Path(self._chosen.file) if self._chosen.file else self._path


def _label(text: str) -> bytes:
    return " ".join(text.split()).encode("utf-8", "surrogateescape")


def change_file(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file's text with `change(text)`, atomically and durably; create it if missing.

    Follows a symbolic link, and keeps owner and mode. Concurrent changes wait for each other.

    Raises:
        OSError: the file cannot be read or written; it is unchanged.

    """
    path = path.resolve()
    with _alone_in(path.parent):
        try:
            text, status = read_file(path)
            owner, mode = (status.st_uid, status.st_gid), stat.S_IMODE(status.st_mode)
        except FileNotFoundError:
            text, owner, mode = b"", (-1, -1), 0o640
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                if hasattr(os, "fchown"):
                    os.fchown(descriptor, *owner)
                if hasattr(os, "fchmod"):
                    os.fchmod(descriptor, mode)
                file.write(change(text))
                file.flush()
                os.fsync(descriptor)
            _replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process changes files of a folder; make the changes durable.

    Raises:
        OSError: the folder cannot be opened, or is locked for longer than `MAX_LOCKED`.

    """
    if fcntl is None:
        with _lock_file(folder / ".keys.lock"):
            yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # not the file, which is replaced
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    """Hold a file that only one process at a time can make, where there is no `flock`."""
    deadline = time.monotonic() + MAX_LOCKED
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            if time.monotonic() > deadline:
                wait = f"another program is changing it; if none is, remove {path}"
                raise OSError(errno.EBUSY, wait) from None
            time.sleep(RETRY_INTERVAL)
    try:
        yield
    finally:
        path.unlink()


def _replace(name: str, path: Path) -> None:
    """Replace a file; on Windows this fails for as long as somebody reads it."""
    for _ in range(10):
        with contextlib.suppress(PermissionError):
            os.replace(name, path)
            return
        time.sleep(RETRY_INTERVAL)
    os.replace(name, path)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Make API keys, and change key files safely. API_KEY_FILE and API_KEY_SALT"
        " come from the environment or .env.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    line = argparse.ArgumentParser(add_help=False)
    line.add_argument("--label", default="", help="whose key it is; shown in logs")
    line.add_argument("--options", default="", help='what it may do: "rate=5/hour running=2"')
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("file", nargs="?", metavar="FILE", help="the key file, else API_KEY_FILE")
    commands.add_parser("add", parents=[line, file], help="add a new key to the key file")
    commands.add_parser("list", parents=[file], help="list labels and options, without the keys")
    revoke = commands.add_parser("revoke", help="remove all keys of a label from the key file")
    revoke.add_argument("label", metavar="LABEL")
    revoke.add_argument("file", nargs="?", metavar="FILE", help="the key file, else API_KEY_FILE")
    commands.add_parser("new", parents=[line], help="print a new key and its line")
    commands.add_parser(
        "hash",
        help="convert plain keys on standard input to lines with digests; keeps options, labels and"
        " comments",
    )
    commands.add_parser("salt", help="print a new salt, for API_KEY_SALT in .env")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "keystore.py") -> int:
    """Run the command line of a program called `prog`; return the exit status."""
    chosen = _parser(prog).parse_args(arguments)
    try:
        settings = load(os.environ)
        path = settings.key_path
        salt = settings.api_key_salt.encode("utf-8", "surrogateescape")
        getattr(Tool(chosen, salt, path), chosen.command)()
    except SettingsError as error:
        return _complain(prog, str(error), Misuse.status)
    except Failure as error:
        return _complain(prog, str(error), error.status)
    except OSError as error:
        then = _HOW_TO_WRITE if error.errno == errno.EROFS else ""
        return _complain(prog, f"{chosen.file or path}: {reason(error)}{then}", Failure.status)
    return 0


def _complain(prog: str, text: str, status: int) -> int:
    print(f"{prog}: {text}", file=sys.stderr)
    return status
