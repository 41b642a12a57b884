"""How fast this project's hot paths are on this machine's CPU, beside packages of the same kind.

Networks have the demo's sizes, read from `conf/`. Peers are networks of about the same size from diffusers,
open_clip and transformers, each left out where the package is missing, trained by the same optimizer and
sampled with as many steps. Every case takes its turn in every round, in rotating order, so that a machine
that slows down slows all of them. Weights are random: this is about speed only.
"""

import argparse
import os
import platform
import statistics
import time
from contextlib import redirect_stderr
from io import StringIO

import torch
from cases import OURS, Case, Demo, our_cases
from peers import PEERS
from torch.utils.flop_counter import FlopCounterMode

from dalle.machine import fast_in_bf16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: what training would take here"
    )
    parser.add_argument("--only", default="", help="only rows whose first column contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one reading, at least one step")
    return parser.parse_args()


def peer_cases(demo: Demo) -> list[Case]:
    cases = []
    for package, builders in PEERS.items():
        try:
            cases += [case for build in builders for case in build(demo)]
        except ImportError as error:
            print(f"{package} is left out: {error}")
    return cases


def measure(cases: list[Case], rounds: int, seconds: float) -> None:
    """Fills the cases' readings."""
    expected = {}
    for case in cases:
        with FlopCounterMode(display=False) as counter:  # the first step of all allocates, too
            case.step()
        case.flops = counter.get_total_flops() // case.samples
        expected[id(case)] = timed(case, 1)
    for turn in range(rounds):
        start = turn % len(cases)
        for case in cases[start:] + cases[:start]:
            case.seconds.append(timed(case, max(1, round(seconds / expected[id(case)]))))


def timed(case: Case, steps: int) -> float:
    """Seconds of one step, as the mean of `steps`."""
    started = time.perf_counter()
    for _ in range(steps):
        case.step()
    return (time.perf_counter() - started) / steps


def table(cases: list[Case]) -> str:
    order = list(dict.fromkeys(case.group for case in cases))
    rows = [
        (
            "what",
            "who",
            "params (M)",
            "GFLOP/sample",
            "samples/s",
            "slowest to fastest",
            "ms/sample",
            "ours is",
            "per FLOP",
        )
    ]
    for case in sorted(cases, key=lambda case: order.index(case.group)):
        rates = sorted(case.samples / s for s in case.seconds)
        rows.append(
            (
                case.group,
                case.name,
                f"{case.params / 1e6:.2f}" if case.params else "",
                f"{case.flops / 1e9:.3g}" if case.flops else "",
                f"{statistics.median(rates):.4g}",
                f"{rates[0]:.4g} to {rates[-1]:.4g}",
                f"{1000 / statistics.median(rates):.3g}",
                "" if case.name == OURS else f"{advantage(cases, case):.2f}x",
                "" if case.name == OURS or not case.flops else f"{per_flop(cases, case):.2f}x",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def per_flop(cases: list[Case], case: Case) -> float:
    """How many times as many FLOPs a second ours does: networks of different packages are never the same."""
    own = next(c for c in cases if c.group == case.group and c.name == OURS)
    return advantage(cases, case) * own.flops / case.flops


def advantage(cases: list[Case], case: Case) -> float:
    """How many times as fast as `case` ours is: the median over rounds, each compared within itself."""
    own = next(c for c in cases if c.group == case.group and c.name == OURS)
    pairs = zip(case.seconds, own.seconds, strict=True)
    return statistics.median(theirs / case.samples / (ours / own.samples) for theirs, ours in pairs)


def summary(cases: list[Case]) -> str:
    """One line: ours against each other row, and what one picture takes."""
    parts = [
        f"{case.group} {advantage(cases, case):.2f}x {case.name.removeprefix(f'{OURS}, ')}"
        for case in cases
        if case.name != OURS
    ]
    parts += [
        f"{case.group} {statistics.median(case.seconds) / case.samples:.3g} s each"
        for case in cases
        if case.group.startswith("caption to picture")
    ]
    return "Ours is, times as fast: " + "; ".join(parts)


def cpu_kind() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    precision = args.precision or ("bf16" if fast_in_bf16() else "fp32")
    demo = Demo(precision)
    cases = [case for case in our_cases(demo) + peer_cases(demo) if args.only in case.group]
    if not cases:
        raise SystemExit(f"no row has '{args.only}' in its first column")
    load = os.getloadavg()[0]
    with redirect_stderr(StringIO()):  # no progress bars: there is no terminal to draw them on
        measure(cases, args.rounds, args.seconds)
    print(
        f"{cpu_kind()}, {args.threads} threads of {os.cpu_count()} CPUs, torch {torch.__version__}, "
        f"{precision}, medians of {args.rounds} rounds, load when started {load:.1f}\n"
    )
    print(table(cases), summary(cases), sep="\n\n")


if __name__ == "__main__":
    main()
