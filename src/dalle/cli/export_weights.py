"""A run as a folder that public libraries read: `dalle export clip logs/first/clip OUT`.

`clip` for transformers, or with layout=open_clip for open_clip; `prior`, `decoder`, `upsampler` and `vqgan`
for diffusers, where their architecture is one of diffusers': see docs/weights.md.
"""

import inspect
from pathlib import Path

from dalle.cli.import_weights import setting
from dalle.errors import UserError, instead, printable


def main(arguments: list[str]) -> None:
    kind, *words = arguments or [""]
    if kind in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nusage: dalle export KIND RUN OUT [SETTING=VALUE ...]")
        raise SystemExit(0)
    from dalle.instantiate import check_arguments
    from dalle.run_dir import Run
    from dalle.weights.exporting import EXPORTERS

    if kind not in EXPORTERS:
        given = f"there is no dalle export {kind}" if kind else "dalle export needs a kind"
        raise UserError(f"{given}{instead(kind, EXPORTERS, '')}")
    write = EXPORTERS[kind]
    own = [name for name in inspect.signature(write).parameters if name not in ("run", "out")]
    settings = dict(setting(word) for word in words if "=" in word and word.split("=")[0] in own)
    places = [word for word in words if word.split("=")[0] not in settings]
    if len(places) != 2:
        more = f", and {', '.join(f'{name}=...' for name in own)}" if own else ""
        raise UserError(f"dalle export {kind} takes a run and the folder to write{more}")
    check_arguments(write, settings, "", partial_call=True)
    run, out = Run(Path(places[0]).expanduser()), Path(places[1]).expanduser()
    if out.exists():
        raise UserError(f"{out} is there already; give a folder that is not")
    write(run, out, **settings)
    licence = run.manifest().get("origin", {}).get("licence")
    print(printable(f"{out}: the {kind} of {run}" + (f"; its licence: {licence}" if licence else "")))
