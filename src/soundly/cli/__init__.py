"""The command line: each verb is a module with a function that adds its parser and one that runs; `VERBS` lists them.

Exit codes are the same for every verb: 0 accepted or proved (or nothing was claimed), 1 refused, refuted or infeasible,
2 an error (a bad file, a wrong argument, a fault of soundly's own), 3 unknown. A verb imports what it needs itself, so
`soundly --help` is quick and `soundly check` runs where there is no torch.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from soundly.cli import audit, bench, check, data, edit, explain, train, verify
from soundly.cli.terminal import ERROR, YES, Verbs, plain
from soundly.errors import SoundlyError

VERBS: tuple[Callable[[Verbs], None], ...] = (
    verify.add, explain.add, edit.add, edit.add_undo, check.add, bench.add, train.add, data.add, audit.add,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Arguments come from the process if argv is None."""
    # Small matrices are slower with several threads, and much slower on a busy machine. Read when numpy starts.
    for library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(library, "1")
    parser = argparse.ArgumentParser(
        prog="soundly",
        description="Guarantees about neural networks.",
        epilog="exit codes: 0 accepted or proved, 1 refused, refuted or infeasible, 2 error, 3 unknown",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in VERBS:
        add(verbs)
    try:
        arguments = parser.parse_args(argv)
        code: int = arguments.run(arguments)
    except SystemExit as stop:  # how argparse ends after --help and after a wrong argument
        return stop.code if isinstance(stop.code, int) else YES
    except SoundlyError as error:
        print(f"soundly: {plain(str(error))}", file=sys.stderr)
        return ERROR
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough; the flush at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except OSError as error:
        print(f"soundly: {plain(str(error))}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("soundly: interrupted", file=sys.stderr)
        return ERROR
    except Exception:  # Python itself would exit with 1, which means refuted
        traceback.print_exc()
        return ERROR
    return code


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"soundly {version('soundly')}")
        except PackageNotFoundError:
            print("soundly, run from its source without being installed")
        parser.exit()
