"""OllProx as an installed package.

Its modules import each other by the names that they have in the checkout. So `main` puts
this folder first on the path, and runs `ollprox.py` as a program.
"""

import os
import runpy
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    """Run the command `ollprox`."""
    sys.path.insert(0, _FOLDER)
    runpy.run_path(os.path.join(_FOLDER, "ollprox.py"), run_name="__main__")


def keys() -> None:
    """Run the command `ollprox-keys`, which is `ollprox keys`."""
    sys.argv[1:1] = ["keys"]
    main()
