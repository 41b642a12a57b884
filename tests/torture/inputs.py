"""Bad settings: every number of every stage's configuration given what is none, and mistakes people make.

Each must end in one line before anything is created.
"""

import random
from pathlib import Path
from typing import Any

import tiny

from torture.kills import STAGES, command
from torture.trial import run

WRONG = ("nan", "inf", "-inf", "ten", "[1,[2]]", "{a:1}", "1e400", "''", "true")
SKIPPED = ("stage", "name", "paths", "hydra", "upstream", "clip", "image_tokenizer")  # text, or of others
MISTAKES: tuple[tuple[str, ...], ...] = (
    ("model=", ), ("model=pirior",), ("model=[clip,prior]",), ("modle=clip",), ("optimizer=null",),
    ("callbacks=null",), ("logger=null",), ("paths=null",), ("tokenizer=null",), ("datamodule=null",),
    ("model.optimizer=null",), ("model.net=null",), ("model.net={}",), ("model._target_=5",),
    ("model._target_=os.system",), ("model._target_=torch.os.system",), ("model._target_=null",),
    ("model.net._target_=dalle.run_dir.os.system",), ("model.net._target_=torch.nn.Identity",),
    ("logger.csv._target_=torch.nn.Identity",), ("callbacks.ema=5",), ("callbacks.ema._target_=torch.load",),
    ("+foo=1",), ("+model.foo=1",), ("debug=foo",), ("name=[a]",), ("name=../out",), ("name=/etc",),
    ("name=a/../..",),
    ("stage=.",), ("stage=..",), ("stage=null",), ("paths.logs=/proc/nowhere",), ("paths.logs=/sys/x",),
    ("paths.logs=/dev/null/x",), ("seed=-1",), ("seed=1e99",), ("seed=99999999999999999999",),
    ("optimizer.lr=-1",), ("optimizer.lr=1e30",), ("optimizer.betas=[0.9]",), ("optimizer.betas=[2,3]",),
    ("optimizer.betas=[nan,0.9]",), ("optimizer.eps=-1",), ("optimizer.weight_decay=-1",),
    ("optimizer.warmup=-5",), ("optimizer.decay_start=5",), ("batch_size=0",), ("batch_size=-3",),
    ("batch_size=100000",), ("trainer.max_steps=0",), ("trainer.max_steps=-7",), ("trainer.max_epochs=0",),
    ("trainer.accumulate_grad_batches=-2",), ("trainer.accumulate_grad_batches=0",),
    ("trainer.gradient_clip_val=-1",), ("trainer.limit_train_batches=0",), ("trainer.val_check_interval=0",),
    ("trainer.log_every_n_steps=-1",), ("trainer.devices=0",), ("trainer.devices=-3",),
    ("trainer.precision=fp7",), ("trainer.accelerator=abacus",), ("trainer.strategy=fast",),
    ("callbacks.ema.decay=1.5",), ("callbacks.ema.decay=-0.1",), ("callbacks.checkpoint.every=-1",),
    ("callbacks.checkpoint.every=0",), ("datamodule.num_workers=-1",), ("datamodule.val_items=-1",),
    ("data=folder",), ("data=folder", "data.root=nowhere"), ("data=folder", "data.root=''"),
    ("data.image_size=0",), ("data.image_size=-16",), ("data.image_size=100000",), ("data.size=-1",),
    ("data.two_objects=2",), ("data.two_objects=-0.5",), ("tokenizer.vocab_size=3",),
    ("sampler.steps=0",), ("sampler.steps=-1",), ("resume=maybe",), ("overwrite=1.5",),
    ("resume=true", "overwrite=true"), ("upstream.clip=nowhere", "model=prior"), ("precision=fp8",),
    ("trainer=tpu",), ("'",), ("=",), ("model",), ("optimizer.lr=${nowhere}",), ("optimizer.lr=[",),
    ("lora.rank=-1",), ("lora.rank=4",), ("init_from=nowhere",), ("model.micro_batch=0",), ("compile=foo",),
    ("callbacks.checkpoint.keep=0",), ("callbacks.checkpoint.best=''",),
    ("callbacks.checkpoint.best_is=mean",), ("callbacks.checkpoint.directory=/elsewhere",),
    ("callbacks.grid.directory=/proc/nowhere",),
    ("trainer=ddp_cpu", "trainer.num_nodes=2"), ("data=mixture", "+data@data.sources.x=folder"),
)  # fmt: skip


def numbers(node: Any, path: str = "") -> list[str]:
    """The dotted paths of all numbers in a configuration."""
    if isinstance(node, dict):
        return [p for k, v in node.items() if k not in SKIPPED for p in numbers(v, f"{path}.{k}".lstrip("."))]
    return [path] if isinstance(node, int | float) and not isinstance(node, bool) else []


def bad_lines(count: int, seed: int) -> list[tuple[str, ...]]:
    """So many different mistakes: those that people make first, then settings drawn from all stages."""
    draw = random.Random(seed)
    pool = []
    for stage in STAGES:
        config = tiny.configure(stage, Path("logs"))
        settings = numbers({k: v for k, v in config.items() if k != "data"})
        settings += [f"data.{path}" for path in numbers(config["data"])]
        taken = [
            s
            for s in settings
            if not s.startswith(("model.optimizer.", "datamodule.source.", "model.sampler"))
        ]
        pool += [(f"stage:{stage}", f"{path}={wrong}") for path in taken for wrong in WRONG]
    lines = [("stage:clip", *line) for line in MISTAKES][:count]
    return lines + draw.sample(pool, max(0, min(count - len(lines), len(pool))))


def refused(folder: Path, line: tuple[str, ...], upstream: Path) -> str:
    """Empty where a mistake is answered by one line, and nothing is left."""
    stage, mistake = line[0].removeprefix("stage:"), line[1:]
    arguments = [a for a in command(stage, folder / "logs", upstream) if not overridden(a, mistake)]
    ended = run(folder, "train.py", *arguments, *mistake)
    fault = ended.fault()
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    return fault or (f"left behind: {', '.join(left[:4])}" if left else "")


def overridden(argument: str, mistake: tuple[str, ...]) -> bool:
    return any(argument.partition("=")[0] == m.partition("=")[0] for m in mistake)
