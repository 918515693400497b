"""soundly beside what a user would run instead: NeuralSAT, Marabou and vibecheck, as their packages are published.

Each peer gets a virtual environment of its own (several GB with PyTorch) in a cache. On every instance all tools run in
turn, one thread each, with their own default settings; compared are CPU seconds of the whole process, user + system, on
instances that both solve. Nothing of a peer is imported: each is run by its command line.

    SOUNDLY_VNNCOMP=dir python benchmarks/peers.py [--instances acasxu:1_1_batch_2000.onnx ...] [--timeout 60] [--json]
"""

import argparse
import gzip
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from soundly.errors import SoundlyError
from soundly.verification.bench import GRACE, Instance, measure, read_instances

INSTANCES = (
    "acasxu:1_1_batch_2000.onnx vnnlib/prop_1.",
    "acasxu:1_1_batch_2000.onnx vnnlib/prop_3.",
    "acasxu:1_7_batch_2000.onnx vnnlib/prop_3.",
    "reach_prob_density:vdp_0.",
    "linearizenn:prop_10_10_0.",
    "mnist_fc:256x2.onnx vnnlib/prop_0_0.03",
    "safenlp:medical__hyperrectangle_1541.",
    "collins_rul_cnn_2023:window_20.onnx vnnlib/robustness_2perturbations_delta5_epsilon10_w20",
)
"""FOLDER:TEXT, each the instances of that folder whose line contains the text: small ones that most tools solve."""

Command = Callable[[Path, Path, Path, float, Path], list[str | Path]]


@dataclass(frozen=True)
class Tool:
    """A verifier: what pip installs for it, and its command line from (bin folder, network, specification, seconds,
    results file). The answer is the first word of the results file, or of its output if it writes none."""

    name: str
    requirements: tuple[str, ...]
    command: Command


def _neuralsat(home: Path, model: Path, spec: Path, seconds: float, result: Path) -> list[str | Path]:
    (script,) = home.parent.glob("lib/python*/site-packages/src/main.py")  # the package has no command of its own
    given: list[str | Path] = ["--net", model, "--spec", spec, "--timeout", f"{seconds:g}"]
    return [home / "python", script, *given, "--device", "cpu", "--result_file", result]


def _marabou(home: Path, model: Path, spec: Path, seconds: float, result: Path) -> list[str | Path]:
    whole = str(math.ceil(seconds))  # 0 would mean no limit
    return [home / "Marabou", model, spec, "--timeout", whole, "--verbosity", "0", "--summary-file", result]


def _vibecheck(home: Path, model: Path, spec: Path, seconds: float, result: Path) -> list[str | Path]:
    given: list[str | Path] = ["--net", model, "--spec", spec, "--timeout", f"{seconds:g}"]
    return [home / "vibecheck", *given, "--device", "cpu", "--results-file", result]


def _soundly(home: Path, model: Path, spec: Path, seconds: float, result: Path) -> list[str | Path]:
    given: list[str | Path] = [model, spec, "--timeout", f"{seconds:g}"]
    return [sys.executable, "-m", "soundly", "verify", *given, "--format", "vnncomp", "--quiet"]


SOUNDLY = Tool("soundly", (), _soundly)
PEERS = (
    Tool("neuralsat", ("neuralsat==0.2.17",), _neuralsat),
    Tool("marabou", ("maraboupy==2.0.0", "numpy<2", "onnx<2", "onnxruntime<1.20"), _marabou),
    Tool("vibecheck", ("vibecheck-nn==1.1.0",), _vibecheck),
)


@dataclass(frozen=True)
class Run:
    """One tool on one instance: "unsat", "sat", "unknown", "timeout", "killed" (beyond a limit) or "error"; CPU and
    wall-clock seconds, bytes."""

    tool: str
    instance: str
    expected: str
    answer: str
    cpu: float
    seconds: float
    memory: int

    @property
    def solved(self) -> bool:
        """Whether there is an answer that no undisputed one contradicts."""
        known = self.expected if self.expected in ("sat", "unsat") else self.answer
        return self.answer in ("sat", "unsat") and self.answer == known


def install(tool: Tool, where: Path) -> Path:
    """The bin folder of the tool's environment, made on the first call and whenever its requirements changed."""
    home, wanted = where / tool.name, "\n".join(tool.requirements)
    stamp = home / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {' '.join(tool.requirements)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        subprocess.run([home / "bin" / "python", "-m", "pip", "install", "--quiet", *tool.requirements], check=True)
        stamp.write_text(wanted)
    return home / "bin"


def run(tool: Tool, home: Path, instance: Instance, memory: int | None) -> Run:
    """Runs a tool in an empty folder on unpacked files."""
    with tempfile.TemporaryDirectory() as folder:
        files = [_unpacked(path, Path(folder)) for path in (instance.model, instance.spec)]
        result = Path(folder) / "result.txt"
        command = tool.command(home, files[0], files[1], instance.limit, result)
        env = {} if tool is SOUNDLY else {"PYTHONPATH": ""}  # meant for soundly, if set
        done = measure(command, timeout=instance.limit + GRACE, memory=memory, cwd=Path(folder), env=env)
        text = result.read_text(errors="replace") if result.exists() else done.out
    word = re.match(r"\s*(unsat|sat|unknown|timeout)\b", text, re.IGNORECASE)
    answer = "killed" if done.killed else word[1].lower() if word else "error"
    return Run(tool.name, instance.name, instance.expected, answer, done.cpu, done.seconds, done.memory)


def _unpacked(path: Path, folder: Path) -> Path:
    target = folder / path.name.removesuffix(".gz")
    target.write_bytes(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    return target


def ratios(runs: Sequence[Run], peer: str) -> list[float]:
    """The peer's CPU seconds over soundly's, on the instances that both solve."""
    ours = {r.instance: r.cpu for r in runs if r.tool == SOUNDLY.name and r.solved}
    return [r.cpu / ours[r.instance] for r in runs if r.tool == peer and r.solved and r.instance in ours]


def choose(root: Path, wanted: Sequence[str], timeout: float) -> list[Instance]:
    """The instances that FOLDER:TEXT name, with names that start with the folder."""
    found = []
    for text in wanted:
        folder, _, only = text.partition(":")
        for i in read_instances(root / folder, timeout=timeout, only=only):
            found.append(Instance(f"{folder} {i.model.name} {i.spec.name}", i.model, i.spec, i.limit, i.expected))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", nargs="+", default=INSTANCES, metavar="FOLDER:TEXT", help="default: small ones")
    parser.add_argument("--peers", nargs="*", default=[p.name for p in PEERS], metavar="NAME", help="default: all")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="caps the time limits; default: 60")
    parser.add_argument("--memory", type=float, default=12.0, metavar="GiB", help="kills what holds more; default: 12")
    parser.add_argument("--where", type=Path, default=Path(__file__).parent / ".peers", help="for the environments")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    root = os.environ.get("SOUNDLY_VNNCOMP")
    if not root or not Path(root).is_dir():
        parser.error("SOUNDLY_VNNCOMP names no directory; set it to one with a folder per benchmark.")
    if unknown := set(args.peers) - {p.name for p in PEERS}:
        parser.error(f"--peers: {', '.join(sorted(unknown))}; known are {', '.join(p.name for p in PEERS)}.")
    try:
        instances = choose(Path(root), args.instances, args.timeout)
    except SoundlyError as problem:
        parser.error(str(problem))
    where = args.where.resolve()
    where.mkdir(parents=True, exist_ok=True)
    (where / ".gitignore").write_text("*\n")
    peers = [p for p in PEERS if p.name in args.peers]
    homes = {p.name: install(p, where) for p in peers} | {SOUNDLY.name: Path(sys.executable).parent}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no tool may outlive this process
    runs: list[Run] = []
    try:
        for instance in instances:
            print(f"\n{instance.name}, expected {instance.expected or 'unknown'}")
            for tool in (SOUNDLY, *peers):
                done = run(tool, homes[tool.name], instance, int(args.memory * 2**30))
                runs.append(done)
                mark = "" if done.solved or done.answer not in ("sat", "unsat") else "  WRONG"
                figures = f"{done.cpu:>7.2f} CPU s  {done.seconds:>7.2f} s  {done.memory / 2**20:>6.0f} MiB"
                print(f"  {tool.name:<10}  {done.answer:<8}  {figures}{mark}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    result = {}
    print(f"\n{'CPU seconds over those of soundly':<36}  both solve  median  geometric mean")
    for peer in peers:
        found = ratios(runs, peer.name)
        middle, mean = (statistics.median(found), statistics.geometric_mean(found)) if found else (None, None)
        result[peer.name] = {"both": len(found), "median": middle, "geometric_mean": mean}
        print(f"{peer.name:<36}  {len(found):>10}" + (f"  {middle:>6.2f}  {mean:>14.2f}" if found else ""))
    if args.json:
        print(json.dumps({"ratios": result, "runs": [asdict(r) for r in runs]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
