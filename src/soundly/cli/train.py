"""`soundly train`: networks that explain themselves, and networks whose explanations stay."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundly.cli.terminal import YES, Verbs, finite, onnx_name, plain, positive, require_targets, status

if TYPE_CHECKING:
    from torch import nn

    from soundly.training.data import Images
    from soundly.training.fit import Epoch
    from soundly.training.masking import Masking
    from soundly.training.sst import Objective, SelfExplaining
    from soundly.training.text import Sentences

MASKINGS = ("certified", "robust", "probabilistic", "baseline")
IMAGES = "digits, mnist-5k, mnist, fashion-mnist"
METHODS = ("int", "int-one-class", "int2", "int-adv", "int2-adv", "pgd", "trades", "ig-norm", "ig-norm-sum", "normal")


def add(verbs: Verbs) -> None:
    train = verbs.add_parser(
        "train",
        help="train a network together with its explanations",
        description="Train on a data set: digits, mnist-5k, or one that `soundly data` has fetched.",
    )
    recipes = train.add_subparsers(title="recipes", metavar="RECIPE", required=True)
    sst = recipes.add_parser(
        "sst",
        help="a network that names the features that suffice for its prediction",
        description="Self-explaining training of a dense network for images, or of one that reads words. Reported: "
        "accuracy, the reasons' size, and how often the prediction stays under every masking, with no reason and with "
        "a constant one beside it; and how many reasons `soundly verify` proves.",
        epilog="example: soundly train sst mnist --size 0.06 --onnx net.onnx",
    )
    _common(sst, IMAGES + ", or tweets", epochs=4, batch=128, lr=2e-3)
    sst.add_argument("--masking", choices=MASKINGS, default="certified", help="trained with; default: certified")
    sst.add_argument("--eps", type=positive, default=0.12, help="how far other features may move; default: 0.12")
    sst.add_argument("--size", type=positive, nargs="+", default=[], metavar="SHARE",
                     help="of features free of charge; each trains a network; default: 0.06, words 0.3")  # fmt: skip
    sst.add_argument("--hidden", type=int, nargs="+", default=[128, 64], metavar="N", help="widths; default: 128 64")
    sst.add_argument("--proofs", type=int, default=100, metavar="N", help="reasons to prove; default: 100")
    sst.add_argument("--plot", type=Path, metavar="F.png", help="size against faithfulness, of all sizes")
    sst.set_defaults(run=_sst)
    stable = recipes.add_parser(
        "int",
        help="a network whose class activation maps stay where they are",
        description="Interpretability-aware training, or one of the methods it is compared with, of a small "
        "convolutional network. Reported: accuracy under attack, and Kendall's tau of attacked maps.",
        epilog="example: soundly train int digits --method int2 --eps 0.15",
    )
    _common(stable, IMAGES, epochs=40, batch=64, lr=3e-3)
    stable.add_argument("--method", choices=METHODS, default="int", help="default: int")
    stable.add_argument("--eps", type=positive, default=0.15, help="of the inner attack; default: 0.15")
    stable.add_argument("--gamma", type=positive, default=1.0, help="weight of the maps' change; default: 1")
    stable.set_defaults(run=_int)


def _common(parser: argparse.ArgumentParser, data: str, *, epochs: int, batch: int, lr: float) -> None:
    parser.add_argument("data", metavar="DATA", help=data)
    parser.add_argument("--epochs", type=int, default=epochs, help=f"default: {epochs}")
    parser.add_argument("--batch", type=int, default=batch, help=f"default: {batch}")
    parser.add_argument("--lr", type=positive, default=lr, help=f"Adam's; default: {lr:g}")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--train", type=int, metavar="N", help="use the first N training examples")
    parser.add_argument("--test", type=int, metavar="N", help="use the first N test examples")
    parser.add_argument("--checkpoint", metavar="F", help="written after each epoch; resumed from if it is there")
    parser.add_argument("--onnx", type=onnx_name, metavar="M.onnx", help="where the network is written")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")


def _sst(arguments: argparse.Namespace) -> int:
    several = len(arguments.size) > 1
    if several and (arguments.onnx or arguments.checkpoint):
        from soundly.errors import InvalidInput

        raise InvalidInput("--onnx and --checkpoint hold one network; give one --size with them.")
    require_targets({"--onnx": arguments.onnx, "--checkpoint": arguments.checkpoint, "--plot": arguments.plot})
    import torch

    from soundly.training import report, sst
    from soundly.training.data import Images
    from soundly.training.masking import Certified

    eps = arguments.eps
    data, build, objective, empirical = _material(arguments)
    masking = next(m for m in [*empirical, Certified(eps)] if m.name == arguments.masking)
    measures = [*empirical, Certified(eps, method="crown-ibp")]
    reports = {}
    for size in arguments.size or [objective.size]:
        torch.manual_seed(arguments.seed)
        model = build()
        sst.train(
            model, data.train, data.train_labels, masking, objective=replace(objective, size=size),
            epochs=arguments.epochs, batch=arguments.batch, lr=arguments.lr, seed=arguments.seed,
            checkpoint=arguments.checkpoint, progress=_shown(arguments),
        )  # fmt: skip
        found = report.evaluate(model, data.test, data.test_labels, measures)
        inputs = model.embed(data.test[: arguments.proofs])
        reports[f"size {size:g}"] = replace(found, proofs=report.prove(model, inputs, eps=eps))
        _keep(model.classifier, inputs[:1], arguments.onnx)
    if arguments.plot:
        report.plot(reports, arguments.plot)
    if arguments.format == "json":
        print(json.dumps(finite({name: asdict(r) for name, r in reports.items()}), indent=2))
    else:
        for line in report.table(reports):
            print(line)
        print("in brackets: with no reason, with a constant one")
        if not isinstance(data, Images):
            for sentence, mask in zip(data.test[:3], model.explain(data.test[:3])[1], strict=True):
                print(f"{data.text(sentence)}\n    {data.text(sentence, mask)}")
    return YES


def _material(
    arguments: argparse.Namespace,
) -> "tuple[Images | Sentences, Callable[[], SelfExplaining], Objective, list[Masking]]":
    """Data, a new network for them, its loss, and the maskings that fit, but for the certified one."""
    from soundly.training import data, sst, text, words
    from soundly.training.masking import Baseline, Probabilistic, Robust

    if arguments.data not in text.NAMES:
        images = data.read(arguments.data).part(arguments.train, arguments.test)
        return (
            images, lambda: sst.mlp(images.shape, images.classes, arguments.hidden),
            sst.Objective(), [Baseline(), Probabilistic(arguments.eps), Robust(arguments.eps)],
        )  # fmt: skip
    sentences = text.read(arguments.data).part(arguments.train, arguments.test)
    mask = sentences.words.index(text.MASK)
    table = words.features(sentences.vectors, sentences.train, sentences.train_labels, seed=arguments.seed)
    return (
        sentences, lambda: words.reader(table, sentences.length, sentences.classes),
        words.OBJECTIVE, [Baseline(table[mask]), Probabilistic(rows=table), Robust(arguments.eps)],
    )  # fmt: skip


def _int(arguments: argparse.Namespace) -> int:
    require_targets({"--onnx": arguments.onnx, "--checkpoint": arguments.checkpoint})
    import torch

    from soundly.training.data import read
    from soundly.training.fit import fit
    from soundly.training.interpretable import method
    from soundly.training.maps import cnn
    from soundly.training.stability import curve, stability

    images, eps = read(arguments.data).part(arguments.train, arguments.test), arguments.eps
    loss = method(arguments.method, eps=eps, gamma=arguments.gamma)
    torch.manual_seed(arguments.seed)
    model = cnn(images.shape[0], images.classes)
    fit(
        model, images.train, images.train_labels, lambda x, y, passed: loss(model, x, y, passed),
        epochs=arguments.epochs, batch=arguments.batch, lr=arguments.lr, seed=arguments.seed,
        checkpoint=arguments.checkpoint, about=loss, progress=_shown(arguments),
    )  # fmt: skip
    x, y = images.test[:500], images.test_labels[:500]
    distances = [0.0, eps / 2, eps, 4 / 3 * eps, 2 * eps]
    rates, firm = curve(model, x, y, distances), stability(model, x, y, eps=eps)
    _keep(model, images.test[:1], arguments.onnx)
    if arguments.format == "json":
        facts = {"accuracy": dict(zip(map(str, distances), rates, strict=True)), **asdict(firm)}
        print(json.dumps(finite(facts), indent=2))
        return YES
    for distance, rate in zip(distances, rates, strict=True):
        print(f"accuracy  {rate:6.1%}  under attacks within {distance:.3g}")
    print(f"tau       {firm.tau:6.3f}  of attacked maps within {eps:g}, where the label stayed: {firm.kept:.1%}")
    return YES


def _shown(arguments: argparse.Namespace) -> Any:
    if arguments.quiet or not sys.stderr.isatty():
        return None

    def show(epoch: "Epoch") -> None:
        bar = "#" * (20 * epoch.done // epoch.of)
        status(f"[{bar:<20}] epoch {epoch.done} of {epoch.of}  loss {epoch.loss:.4f}  {epoch.seconds:.0f} s")
        if epoch.done == epoch.of:
            status("")

    return show


def _keep(model: "nn.Module", example: Any, file: str | None) -> None:
    if file is not None:
        from soundly.graph.load import load
        from soundly.graph.to_onnx import to_onnx

        to_onnx(load(model, example), file)
        print(f"written to {plain(file)}", file=sys.stderr)
