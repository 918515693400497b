"""`python -m soundly` is the command `soundly`."""

from soundly.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
