"""What a training would take on machines that are not here: `dalle costs model=decoder_paper devices=8,64`.

Memory of a device and time of a step, from a step on no device at all and stated rates: memory= (bytes) rate=
share= stream= near= far= machine= of a device; an H100's to begin with. items= says how many pictures there
are where they are not here. All other words are those of `dalle train`. Nothing is trained, and nothing needs
to have been.
"""

import tempfile
from typing import Any

from dalle.cli.compose import Job, compose
from dalle.errors import UserError

PAPERS = ("clip_paper", "prior_paper", "ar_prior_paper", "decoder_paper", "upsampler_64_256_paper",
          "upsampler_256_1024_paper", "dvae_paper", "dalle_paper")  # fmt: skip
DEVICES = (8, 32, 128, 512, 1024)


def main(arguments: list[str]) -> None:
    if any(word in ("-h", "--help") for word in arguments):
        usage = "dalle costs [model=...] [devices=8,64] [items=N] SETTING=VALUE ..."
        print(f"{(__doc__ or '').strip()}\n\nusage: {usage}")
        raise SystemExit(0)
    from dalle.instantiate import check_arguments
    from dalle.training import costs

    names = ("devices", "model", "items", *costs.settings())
    own = {word.partition("=")[0]: word for word in arguments if word.partition("=")[0] in names}
    rest = [word for word in arguments if word not in own.values()]
    given = {name: number(own[name]) for name in costs.settings() if name in own}
    check_arguments(costs.Device, given, "", partial_call=True)
    device = costs.Device(**given)
    items = number(own["items"]) if "items" in own else None
    devices = [int(number(f"devices={n}")) for n in values(own.get("devices"))] or DEVICES
    models = values(own.get("model")) or PAPERS
    for model in models:  # all are looked at before the first of many minutes
        compose("train", [f"model={model}", *rest, "precision=bf16"])
    print(costs.described(device), end="\n\n")
    print("\n".join(costs.HEAD))
    for model in models:
        print("\n".join(costs.table(model, step_of(model, rest, items), devices, device)), flush=True)


def values(word: str | None) -> list[str]:
    return word.partition("=")[2].split(",") if word else []


def number(word: str) -> Any:
    name, _, text = word.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf") or (name in ("devices", "machine", "items") and value != int(value)):
        raise UserError(f"{word}: give a number above 0")
    return int(value) if value == int(value) else value


def step_of(model: str, words: list[str], items: int | None) -> Any:
    """What a step of a preset takes; the networks that it needs are of no weight, either.

    Args:
        items: pictures that are not here; None: `words` say where they are.
    """
    import torch

    from dalle.cli.train import upstream
    from dalle.training import costs, fit, ladder

    with tempfile.TemporaryDirectory() as nowhere:
        (job, *more) = compose("train", [f"model={model}", *words, f"paths.logs={nowhere}", "precision=bf16"])
        if more:
            raise UserError("several settings are several trainings; give one")
        first: list[Job] = []
        for stage, run in fit.missing_runs(job.config).items():
            first += compose("train", upstream(job.words, stage, run))
        configs = [one.config for one in first] + [job.config]
        for config in configs:
            config["trainer"] |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
            if items is not None:
                config["data"] = config["datamodule"]["source"] = {
                    "_target_": "dalle.data.shapes.Shapes", "_partial_": True, "size": items,
                    "image_size": config["data"].get("image_size", 64),
                }  # fmt: skip
        for config, stage, datamodule in ladder.built(configs, here=False):
            if config["paths"]["run"] == job.config["paths"]["run"]:  # before it is frozen for another stage
                with torch.device("meta"):
                    return costs.simulate(config, stage, datamodule.sizes)
    raise UserError(
        f"costs of model={model} are not known: it takes its sizes from weights that are not here"
    )
