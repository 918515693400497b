"""`soundly explain`: which features of an input decide the answer, with proof."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundly.cli.terminal import NO, UNKNOWN, YES, Verbs, finite, plain, positive, require_targets
from soundly.cli.verify import facts_of
from soundly.errors import InvalidInput

if TYPE_CHECKING:
    import torch

    from soundly.explanation.reason import Reason
    from soundly.graph.network import Network
    from soundly.verification.verdict import Verdict


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "explain",
        help="find the features that decide an answer, with proof",
        description="Find a minimal set of features that decides the answer whatever the others do within a radius, "
        "with proof; or decide whether a given mask is one.",
        epilog="exit codes: 0 proved, 1 refuted, 2 error, 3 unknown; "
        "example: soundly explain net.onnx --input digit.png --eps 0.1 --report why.html",
    )
    parser.add_argument("model", metavar="MODEL", help="a network, .onnx or .onnx.gz")
    parser.add_argument("--input", required=True, metavar="X", help="the input: .npy, or .png scaled to [0, 1]")
    parser.add_argument("--eps", type=positive, required=True, metavar="E", help="how far features may move")
    parser.add_argument("--target", type=int, metavar="T", help="the output that must stay the largest")
    parser.add_argument("--range", nargs=2, type=float, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
                        help="of valid inputs; default: 0 1")  # fmt: skip
    parser.add_argument("--mask", metavar="M.npy", help="decide whether this mask is sufficient: true keeps a feature")
    parser.add_argument("--keep", metavar="M.npy", help="features to keep in any case: repairs a mask")
    parser.add_argument("--groups", metavar="G.npy", help="the feature of each entry: superpixels, tokens")
    parser.add_argument("--search", type=positive, default=0.0, metavar="S", help="seconds of search per feature")
    parser.add_argument("--timeout", type=positive, metavar="S", help="seconds, for the search")
    parser.add_argument("--layer", metavar="L", help="a Grad-CAM there, bounded, for the report")
    parser.add_argument("--certificate", metavar="F", help="where the proof is written, for `soundly check`")
    parser.add_argument("--save", metavar="M.npy", help="where the mask is written")
    parser.add_argument("--report", metavar="R.html", help="where a page with pictures is written")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    files = {"--certificate": arguments.certificate, "--save": arguments.save, "--report": arguments.report}
    sources = {name: getattr(arguments, name) for name in ("mask", "keep", "groups")}
    require_targets(files, MODEL=arguments.model, **{"--input": arguments.input},
                    **{f"--{name}": path for name, path in sources.items() if path})  # fmt: skip
    if arguments.mask and arguments.keep:
        raise InvalidInput("--mask, --keep: give one; a mask is decided as it is, features to keep are added to.")
    import numpy as np

    from soundly.explanation.question import question
    from soundly.explanation.reason import certify_mask, explain
    from soundly.graph.load import load
    from soundly.verification.verdict import Proved

    started = time.monotonic()
    network = load(arguments.model)
    x = read_input(arguments.input, network)
    given: dict[str, Any] = {name: None if path is None else _array(path) for name, path in sources.items()}
    asked: dict[str, Any] = {"eps": arguments.eps, "target": arguments.target, "clip": tuple(arguments.range),
                             "groups": given["groups"]}  # fmt: skip
    found: Reason | None = None
    if arguments.mask:
        verdict: Verdict = certify_mask(network, x, given["mask"], timeout=arguments.timeout, **asked)
        about = question(network, x, **asked)
        mask = about.spread(about.kept(given["mask"])).reshape(x.shape).numpy()
    else:
        found = explain(
            network, x, keep=given["keep"], search=arguments.search, timeout=arguments.timeout, **asked
        )  # fmt: skip
        verdict, mask = found.verdict, found.mask.numpy()
    facts = {"model": arguments.model, "input": arguments.input, "eps": arguments.eps, **facts_of(verdict)}
    facts["seconds"] = time.monotonic() - started
    if found is not None:
        facts |= {"size": found.size, "features": len(found.kept), "minimal": found.minimal,
                  "verifier": found.verifier, "necessary": int(found.necessary.sum()),
                  "kept": found.kept.nonzero().flatten().tolist()}  # fmt: skip
    if arguments.save:
        with open(arguments.save, "wb") as file:  # numpy would add .npy to other names
            np.save(file, mask)
    certificate = arguments.certificate
    if isinstance(verdict, Proved):
        if certificate is None and arguments.report:
            certificate = str(Path(arguments.report).with_suffix(".cert"))
        if certificate:
            verdict.certificate.save(certificate)
    facts["certificate"] = certificate if isinstance(verdict, Proved) else None
    if arguments.report:
        _report(arguments, network, x, mask, verdict, facts)
    if arguments.format == "json":
        print(json.dumps(finite(facts), indent=2, sort_keys=True))
    else:
        for line in _text(facts):
            print(plain(line))
    return {"proved": YES, "empty": YES, "refuted": NO, "unknown": UNKNOWN}[facts["verdict"]]


def read_input(path: str, network: "Network") -> "torch.Tensor":
    """An input of the network from a file.

    Raises:
        InvalidInput: it has another size, or is neither .npy nor .png.
    """
    import numpy as np
    import torch

    shape = network.input.shape
    if path.endswith(".npy"):
        array = _array(path)
    elif path.endswith(".png"):
        from soundly.report.figures import optional

        array = optional("matplotlib.image").imread(path)
        if array.ndim == 3:
            array = array[:, :, : 3 if array.shape[2] > 2 else 1]
            if array.shape[2] == 3 and array.shape[0] * array.shape[1] == np.prod(shape):
                if not (array == array[:, :, :1]).all():
                    raise InvalidInput(f"--input: {path} is in colour, but the network takes {list(shape)}.")
                array = array[:, :, :1]
            if not (len(shape) == 4 and tuple(shape[1:]) == array.shape):
                array = array.transpose(2, 0, 1)
    else:
        raise InvalidInput(f"--input: {path} is neither .npy nor .png.")
    if array.size != np.prod(shape) or array.dtype == object or not np.isfinite(array).all():
        raise InvalidInput(f"--input: {path} holds {list(array.shape)}, but the network takes {list(shape)} numbers.")
    return torch.from_numpy(np.ascontiguousarray(array.reshape(shape))).to(network.dtype)


def _array(path: str) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InvalidInput(f"{path} is no array of numpy's: {error}") from error


def _text(facts: dict[str, Any]) -> Iterator[str]:
    """The verdict, then the reason."""
    if "size" in facts:
        share = f"{facts['size']} of {facts['features']} features"
        if facts["verdict"] == "proved":
            yield f"proved        {share} decide the answer, {facts['arithmetic']}"
            word = "none can be left out" if facts["minimal"] else "perhaps some can be left out"
            yield f"  minimal     {word}, as far as {facts['verifier']} can tell; {facts['necessary']} with a witness"
            shown = ", ".join(map(str, facts["kept"][:12]))
            yield f"  kept        {shown}{', ...' if len(facts['kept']) > 12 else ''}"
        else:
            yield f"{facts['verdict']:<12}  not even all features kept are proved to decide: look at the input"
    elif facts["verdict"] == "proved":
        yield f"proved        the mask decides the answer, {facts['arithmetic']}"
    elif facts["verdict"] == "refuted":
        yield f"refuted       an input that agrees on the mask gets another answer, replayed by {facts['replayed']}"
    else:
        yield f"unknown       {facts['reason']}"
    yield f"  effort      {facts['seconds']:.2f} s"
    if facts["certificate"]:
        yield f"  certificate {facts['certificate']}"


def _report(
    arguments: argparse.Namespace, network: "Network", x: "torch.Tensor", mask: Any, verdict: "Verdict",
    facts: dict[str, Any],
) -> None:  # fmt: skip
    import numpy as np
    import torch

    from soundly import report
    from soundly.explanation.attribution import gradcam
    from soundly.explanation.certified import certify_map
    from soundly.explanation.reason import certify_mask
    from soundly.report.reasons import reason_report
    from soundly.spec.region import Ball, Box
    from soundly.verification.verdict import Proved, Refuted

    def answer(z: "torch.Tensor") -> int:
        return int(network(z.to(x).reshape(x.shape)).argmax())

    label = answer(x) if arguments.target is None else arguments.target
    if isinstance(verdict, Refuted):
        without: Verdict = verdict
    else:
        nothing = np.zeros(x.shape, dtype=bool)
        without = certify_mask(network, x, nothing, eps=arguments.eps, target=arguments.target,
                               clip=tuple(arguments.range), timeout=10.0)  # fmt: skip
    witness = None
    if isinstance(without, Refuted):
        witness = (without.witness.numpy(), f"output {answer(without.witness)}")
    maps = None
    if arguments.layer:
        low, high = (torch.full_like(x, v) for v in arguments.range)
        network_map = gradcam(network, of=label, layer=arguments.layer)
        bounds = certify_map(network_map, Ball(x, arguments.eps, "linf", Box(low, high)), timeout=60.0)
        if isinstance(bounds.verdict, Proved) and bounds.lower.dim() == 2:
            maps = (bounds.lower.numpy(), network_map(x).numpy(), bounds.upper.numpy())
        else:
            print("soundly: the map is not bounded: no picture of it", file=sys.stderr)
    shown = ("model", "input", "eps", "size", "features", "minimal", "verifier", "necessary", "seconds")
    word = {"proved": "PROVED", "empty": "UNKNOWN", "refuted": "REFUTED", "unknown": "UNKNOWN"}[facts["verdict"]]
    page = reason_report(
        title=f"Why output {label}?",
        statement=f"Every input within {arguments.eps:g} that agrees with this one on what is kept gets the answer "
        f"{label}.",
        verdict=report.Verdict[word], shape=tuple(x.shape), x=x.numpy(),
        mask=mask, label=f"output {label}",
        facts=[(name, v if isinstance(v := facts[name], float) else str(v)) for name in shown if name in facts],
        witness=witness, maps=maps,
        certificate=None if not facts["certificate"] else report.Certificate.of(Path(facts["certificate"])),
    )  # fmt: skip
    report.write_report(page, arguments.report)
