"""Build OllProx as one file: a zip application with its two dependencies inside.

Usage: make_pyz.py FILE, with a Python in which the packages of requirements.txt are installed.
The same sources and packages give the same bytes on any machine: the entries are sorted, have
fixed times and modes, and are not compressed, since compressors differ.
"""

import io
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("h11", "python-dotenv")
SHEBANG = b"#!/usr/bin/env python3\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold
MAIN = b"import sys\n\nimport ollprox\n\nsys.exit(ollprox.main())\n"


def own_files() -> dict[str, bytes]:
    """Return the program's files by name: those that the wheel has too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: set[Path] = set()
    for pattern in project["tool"]["hatch"]["build"]["targets"]["wheel"]["include"]:
        found.update(ROOT.glob(pattern.lstrip("/")))
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in found}


def package_files(package: Distribution) -> dict[str, bytes]:
    """Return the modules and licenses of an installed package."""
    return {
        file.as_posix(): Path(str(file.locate())).read_bytes()
        for file in package.files or ()
        if file.suffix == ".py" or "license" in file.name.lower()
    }


def archive(files: dict[str, bytes]) -> bytes:
    """Return a zip application of files, which start at its top."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3  # Unix, wherever this runs
            entry.external_attr = 0o100644 << 16
            target.writestr(entry, data)
    return buffer.getvalue()


def main() -> None:
    """Write the file that the command line names."""
    files = {"__main__.py": MAIN, "LICENSE": (ROOT / "LICENSE").read_bytes(), **own_files()}
    for name in PACKAGES:
        files |= package_files(distribution(name))
    path = Path(sys.argv[1])
    path.write_bytes(archive(files))
    path.chmod(0o755)


if __name__ == "__main__":
    main()
