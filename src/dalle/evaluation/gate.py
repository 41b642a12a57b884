"""A gate against regressions: the demo's run is measured again and compared with recorded figures.

Nothing is trained. `make gate` fails when a figure has left its recorded interval; `make gate RECORD=1`
records anew. What the figures were made of is in the file beside them.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle import schemas
from dalle.errors import UserError, Words
from dalle.evaluation.report import number
from dalle.evaluation.results import Result, figure_of, flat
from dalle.files import check_writable, write_json
from dalle.launch.overrides import quote
from dalle.launch.processes import call, child_command
from dalle.reading import read_json
from dalle.run_dir import Run

CLIP = {"features.weights", "scorer.clip"}  # of the demo itself: another one makes other figures
SETTINGS: tuple[str, ...] = (
    "n=256",
    "metrics=[fid,kid,precision_recall,clip_score,retrieval,hard_negatives,judge]",
    "features=clip",
    "precision=fp32",
    "trainer=cpu",
)
OTHER = ("machine", "processes", "time", "memory")  # of the protocol: of no matter to these figures


def measure(folder: Path, settings: list[str]) -> Result:
    """A fresh evaluation, whatever was evaluated before. Raises UserError where it fails."""
    if not Run(folder / "decoder").finished:
        raise UserError(f"{folder} holds no finished run to measure; `make demo` trains one in a few minutes")
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"name={quote(folder.name)}", f"paths.logs={quote(str(folder.parent))}"]
        places = [f"{name}={quote(f'{scratch}/{name}')}" for name in ("out", "note")]
        words += [*settings, "overwrite=true", *places]
        if call([*child_command("evaluate"), *words]):
            raise UserError("the evaluation failed, see above")
        return Result.read(Path(scratch, "note").read_text(encoding="utf-8").strip())


def record(result: Result, settings: list[str], path: Path) -> None:
    figures = {name: figure._asdict() for name, figure in result.figures.items()}
    facts = {
        "made_by": "make gate RECORD=1",
        "settings": settings,
        "weights": result.target["weights"],
        "protocol": result.protocol,
        "environment": result.environment,
        "figures": figures,
    }
    write_json(path, facts)


def compare(result: Result, recorded: dict[str, Any]) -> list[str]:
    """A line for every figure that left its interval. With another CLIP only the judge's figures compare.

    Raises:
        UserError: the protocol is another one, so that nothing can be said.
    """
    facts = [
        {k: v for k, v in flat(p).items() if k not in OTHER} for p in (recorded["protocol"], result.protocol)
    ]
    then, now = facts
    different = {key for key in then | now if then.get(key) != now.get(key)}
    if other := sorted(different - CLIP):
        changes = "; ".join(f"{key} was {then.get(key)}, is {now.get(key)}" for key in other)
        raise UserError(f"the recorded figures are of another protocol ({changes}); make gate RECORD=1")
    left = []
    for name, ends in recorded["figures"].items():
        figure = figure_of(ends)
        found = result.figures.get(name)
        if different and not name.startswith("judge/"):
            continue  # seen through another CLIP
        if found is None:
            left.append(f"{name} is missing; recorded was {number(figure.value)}")
        elif not figure.low <= found.value <= figure.high:
            interval = f"{number(figure.low)} to {number(figure.high)}"
            left.append(f"{name} is {number(found.value)}, outside its interval {interval}")
    return left


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Words(prog="dalle gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder with clip, prior and decoder, e.g. logs/demo")
    parser.add_argument("--file", type=Path, default=Path("benchmarks/gate.json"))
    parser.add_argument("--record", action="store_true", help="write the file instead of comparing with it")
    parser.add_argument(
        "settings", nargs="*", help="of dalle evaluate, when recording; else those of the file"
    )
    args = parser.parse_args(arguments)
    if args.record:
        if args.file.exists():
            read_json(args.file, schemas.Gate, "it is no gate's file, and is kept; give another --file")
        check_writable(args.file.parent, "--file")
        settings: list[str] = args.settings or list(SETTINGS)
        record(measure(args.runs, settings), settings, args.file)
        print(f"recorded in {args.file}")
        return
    if not args.file.is_file():
        raise UserError(f"there are no recorded figures at {args.file}; make gate RECORD=1 writes them")
    recorded: Any = read_json(args.file, schemas.Gate, "make gate RECORD=1 writes it anew")
    result = measure(args.runs, recorded["settings"])
    left = compare(result, recorded)
    retrained = result.target["weights"] != recorded["weights"]
    if retrained:
        print(f"note: {args.runs} holds other weights than those recorded: it was trained again")
    if left:
        why = "; it was trained again, so the training may be why" if retrained else ""
        raise UserError(f"{len(left)} figures left their recorded intervals{why}: {'; '.join(left)}")
    print("all figures that compare are within their recorded intervals")
