"""Run OllProx by `python -m ollprox`."""

from ollprox import main

main()
