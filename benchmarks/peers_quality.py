"""Quality at equal time: dalle-pytorch and DALLE2-pytorch trained on `shapes` for so many minutes, judged as
`python -m dalle demo` judges this project's pipelines. One thread, fp32.

    python benchmarks/peers_quality.py train dalle-pytorch --minutes 10 --out logs/peers/dalle-pytorch
    python benchmarks/peers_quality.py judge dalle-pytorch --out logs/peers/dalle-pytorch

DALLE2-pytorch's CLIP is a run of ours: `--clip logs/demo/clip`. `judge dalle` and `judge unclip` judge runs
of this project alike: `--out logs/demo`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dalle.data.shapes import Shapes, prompts
from dalle.data.sources import EpochSampler
from dalle.data.tokenizers import CaptionTokenizer
from dalle.evaluation.demo import KINDS, load, verdicts
from dalle.evaluation.seen_captions import captions_read
from dalle.files import atomic_path, write_json
from dalle.images import from_uint8, grid, to_uint8
from dalle.metrics.judge import Judge
from dalle.run_dir import load_clip

SIDE, BATCH = 32, 64  # of pictures, and how many are sampled at once
TOKENIZER_CAPTIONS = 50_000
OURS = ("dalle", "unclip")
PROMPTS = Path(__file__).parents[1] / "prompts" / "shapes.txt"

Batch = tuple[Tensor, list[str]]
Sample = Callable[[list[str], dict[str, Any]], Tensor]  # captions and options -> pictures in [-1, 1]


@dataclass
class Part:
    """What one network of a peer was trained with, and how far it came."""

    parameters: int
    steps: int
    pictures: int
    seconds: float
    loss: float
    """Mean of the last tenth of the steps."""


def stand_ins() -> None:
    """Modules that the peers import and newer releases no longer have. None computes anything."""
    if "pkg_resources" not in sys.modules:
        module = types.ModuleType("pkg_resources")
        module.get_distribution = importlib.metadata.distribution  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules["pkg_resources"] = module
    if importlib.util.find_spec("pytorch_lightning"):
        from pytorch_lightning.utilities.rank_zero import rank_zero_only  # pyright: ignore[reportMissingImports]

        module = types.ModuleType("pytorch_lightning.utilities.distributed")
        module.rank_zero_only = rank_zero_only  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules.setdefault(module.__name__, module)


class Pictures:
    """Endless batches of the train split; remembers the captions that were handed out."""

    def __init__(self, seed: int = 0) -> None:
        self.source, self.seed = Shapes("train", image_size=SIDE), seed
        self.read: set[str] = set()

    def batches(self, size: int, stream: int) -> Iterator[Batch]:
        """Pictures (size, 3, 32, 32) in [-1, 1] and captions, shuffled; another stream, another order."""
        n = len(self.source)
        sampler = EpochSampler(n, size, shuffle=True, drop_last=True, seed=self.seed + stream)
        for epoch in count():
            sampler.set_epoch(epoch)
            for items in sampler:
                items = [item % n for item in items]
                yield self.source.images(items), self.source.captions_of(items)


def fit(
    network: nn.Module,
    loss_of: Callable[[Tensor, list[str], float], Tensor],
    batches: Iterable[Batch],
    seconds: float,
    lr: float,
    weight_decay: float = 0.0,
    clip: float = 0.5,
) -> Part:
    """Trains with AdamW until the time is over, drawing included; the rate falls linearly to zero with it.

    `loss_of` gets pictures, captions and the share of the time that has passed.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
    losses: list[float] = []
    pictures, begun = 0, time.perf_counter()
    for image, captions in batches:
        passed = (time.perf_counter() - begun) / seconds
        if passed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - passed)
        optimizer.zero_grad()
        loss = loss_of(image, captions, passed)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        losses.append(loss.item())
        pictures += len(image)
        if len(losses) % 200 == 1:
            print(
                f"{type(network).__name__} {passed:4.0%} step {len(losses)} loss {losses[-1]:.4f}", flush=True
            )
    last = losses[-max(1, len(losses) // 10) :]
    size = sum(weight.numel() for weight in weights)
    return Part(size, len(losses), pictures, time.perf_counter() - begun, sum(last) / len(last))


class DallePytorch:
    """Its DiscreteVAE, then its DALLE: four and six tenths of the time."""

    package = "dalle-pytorch"
    rates: ClassVar = {"vae": 1e-3, "dalle": 1e-3}
    choices: ClassVar = [
        {"cond_scale": scale, "temperature": temperature}
        for scale in (1.0, 3.0)
        for temperature in (0.5, 1.0)
    ]

    def __init__(self, tokenizer: CaptionTokenizer, clip: Path | None) -> None:
        from dalle_pytorch import DALLE, DiscreteVAE  # pyright: ignore[reportMissingImports]

        self.tokenizer = tokenizer
        self.vae = DiscreteVAE(
            image_size=SIDE,
            num_layers=2,
            num_tokens=512,
            codebook_dim=128,
            hidden_dim=64,
            num_resnet_blocks=1,
        )
        self.dalle = DALLE(
            dim=128,
            vae=self.vae,
            num_text_tokens=tokenizer.vocab_size,
            text_seq_len=tokenizer.context_length,
            depth=4,
            heads=4,
            dim_head=32,
        )
        self.network = self.dalle

    def train(self, data: Pictures, seconds: float, rates: dict[str, float]) -> dict[str, Part]:
        def vae_loss(image: Tensor, captions: list[str], passed: float) -> Tensor:
            temperature = 1 / 16 + (1 - 1 / 16) * (1 + math.cos(math.pi * passed)) / 2
            return self.vae((image + 1) / 2, return_loss=True, temp=temperature)

        def dalle_loss(image: Tensor, captions: list[str], passed: float) -> Tensor:
            data.read.update(captions)
            text = self.tokenizer(captions)
            return self.dalle(text, (image + 1) / 2, return_loss=True, null_cond_prob=0.2)

        self.vae.requires_grad_(True)
        parts = {"vae": fit(self.vae, vae_loss, data.batches(32, 0), 0.4 * seconds, rates["vae"])}
        self.vae.requires_grad_(False)
        parts["dalle"] = fit(self.dalle, dalle_loss, data.batches(16, 1), 0.6 * seconds, rates["dalle"])
        return parts

    def sample(self, captions: list[str], options: dict[str, Any]) -> Tensor:
        # The keys and values of the caption must be cached: the pass without a caption overwrites it.
        text = self.tokenizer(captions)
        return self.dalle.generate_images(text, filter_thres=0.9, use_cache=True, **options)


class Dalle2Pytorch:
    """A CLIP of ours, its DiffusionPrior for a tenth of the time, and its Decoder."""

    package = "dalle2-pytorch"
    rates: ClassVar = {"prior": 1e-3, "decoder": 1e-3}
    choices: ClassVar = [{"cond_scale": scale} for scale in (1.0, 2.0, 4.0)]

    def __init__(self, tokenizer: CaptionTokenizer, clip: Path | None) -> None:
        from dalle2_pytorch import Decoder, DiffusionPrior, DiffusionPriorNetwork, Unet  # pyright: ignore[reportMissingImports]

        if clip is None:
            raise SystemExit("DALLE2-pytorch needs --clip, a finished run of model=clip.")
        adapter = adapted(clip)
        self.tokenizer, width, length = adapter.clip.tokenizer, adapter.dim_latent, adapter.max_text_len
        net = DiffusionPriorNetwork(
            dim=width, depth=4, heads=4, dim_head=32, num_timesteps=1000, max_text_len=length
        )
        self.prior = DiffusionPrior(
            net, clip=adapter, timesteps=1000, sample_timesteps=64, cond_drop_prob=0.1
        )
        unet = Unet(
            dim=24,
            image_embed_dim=width,
            text_embed_dim=width,
            cond_dim=64,  # as wide as the embedding it fails: there is no layer then that makes tokens of it
            dim_mults=(1, 2, 4),
            attn_heads=4,
            num_resnet_blocks=1,
            cond_on_text_encodings=True,
            max_text_len=length,
        )
        self.decoder = Decoder(
            unet,
            clip=adapter,
            image_size=SIDE,
            timesteps=1000,
            sample_timesteps=50,
            image_cond_drop_prob=0.1,
            text_cond_drop_prob=0.1,
            learned_variance=False,
        )
        self.network = nn.ModuleDict({"prior": self.prior, "decoder": self.decoder})

    def train(self, data: Pictures, seconds: float, rates: dict[str, float]) -> dict[str, Part]:
        def prior_loss(image: Tensor, captions: list[str], passed: float) -> Tensor:
            data.read.update(captions)
            return self.prior(text=self.tokenizer(captions), image=image)

        def decoder_loss(image: Tensor, captions: list[str], passed: float) -> Tensor:
            data.read.update(captions)
            text = self.tokenizer(captions)
            embed, _ = self.prior.clip.embed_image(image)
            return self.decoder((image + 1) / 2, text=text, image_embed=embed)

        prior = fit(self.prior, prior_loss, data.batches(128, 0), 0.1 * seconds, rates["prior"], 1e-2)
        decoder = fit(self.decoder, decoder_loss, data.batches(32, 1), 0.9 * seconds, rates["decoder"], 1e-2)
        return {"prior": prior, "decoder": decoder}

    def sample(self, captions: list[str], options: dict[str, Any]) -> Tensor:
        text = self.tokenizer(captions)
        embed = self.prior.sample(text, num_samples_per_batch=2)
        return self.decoder.sample(image_embed=embed, text=text, **options) * 2 - 1


PEERS = {peer.package: peer for peer in (DallePytorch, Dalle2Pytorch)}


def adapted(run: Path) -> Any:
    """A CLIP of ours behind DALLE2-pytorch's interface for the CLIPs of others: pictures in [-1, 1]."""
    from dalle2_pytorch.dalle2_pytorch import BaseClipAdapter, EmbeddedImage, EmbeddedText  # pyright: ignore[reportMissingImports]

    class Adapter(BaseClipAdapter):
        dim_latent = property(lambda self: self.clip.embed_dim)
        image_size = property(lambda self: SIDE)
        image_channels = property(lambda self: 3)
        max_text_len = property(lambda self: self.clip.context_length)

        @torch.no_grad()
        def embed_text(self, text: Tensor) -> Any:
            made = self.clip.embed_text(text)
            hidden = made["text_hidden"].masked_fill(~made["text_mask"][..., None], 0.0)
            return EmbeddedText(nn.functional.normalize(made["text_embed"], dim=-1), hidden)

        @torch.no_grad()
        def embed_image(self, image: Tensor) -> Any:
            return EmbeddedImage(nn.functional.normalize(self.clip.embed_image(image), dim=-1), None)

    return Adapter(load_clip(run))


def tokenizer_of_shapes() -> CaptionTokenizer:
    """The project's own, of training captions."""
    captions = Shapes("train").captions_of(range(TOKENIZER_CAPTIONS))
    return CaptionTokenizer.train(captions, 2048, "auto")


def drawn(
    sample: Sample, options: dict[str, Any], n: int, split: str, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """Pictures of n prompts of each of the demo's kinds, in the order of `verdicts`, and their captions."""
    captions: list[str] = []
    for kind in KINDS.values():
        for seen in (True, False):
            captions += prompts(kind, seen=seen, n=n, seed=seed, split=split)[0]
    torch.manual_seed(seed)
    made = [sample(captions[at : at + BATCH], options) for at in range(0, len(captions), BATCH)]
    return from_uint8(to_uint8(torch.cat(made).clamp(-1, 1))), captions


def judged(
    sample: Sample, choices: list[dict[str, Any]], read: set[str], n: int, choose_n: int
) -> dict[str, Any]:
    """What the judge says of the test split, sampled with the options that have most right on the
    validation split; of equally many the first.
    """
    tried = []
    for options in choices if len(choices) > 1 else ():
        images, captions = drawn(sample, options, choose_n, "val")
        tried.append({**options, "right": verdicts(images, captions, read)["judge/all"]})
        print(f"validation split, {tried[-1]}", flush=True)
    best = max(range(len(tried)), key=lambda at: tried[at]["right"], default=0)
    begun = time.perf_counter()
    images, captions = drawn(sample, choices[best], n, "test")
    took = (time.perf_counter() - begun) / len(captions)
    attributes = {name: marks.nanmean().item() for name, marks in Judge()(images, captions).items()}
    facts = {"n": n, "options": choices[best], "tried": tried, "seconds_per_image": took}
    return {**facts, "attributes": attributes, **verdicts(images, captions, read)}


def sheet(sample: Sample, options: dict[str, Any], path: Path) -> None:
    """A grid of what is drawn for the demo's prompts."""
    captions = PROMPTS.read_text().splitlines()
    torch.manual_seed(0)
    with atomic_path(path) as beside:
        grid(sample(captions, options).clamp(-1, 1), captions).save(beside, "PNG")


def train(name: str, minutes: float, out: Path, clip: Path | None, rates: dict[str, float]) -> dict[str, Any]:
    """Trains a peer and leaves weights, the captions it read and a row of facts in `out`."""
    torch.manual_seed(0)
    peer = PEERS[name](tokenizer_of_shapes(), clip)
    data, rates = Pictures(), {**peer.rates, **rates}
    parts = peer.train(data, 60 * minutes, rates)
    row = {
        "peer": f"{name} {importlib.metadata.version(name)}",
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "rates": rates,
        "parts": {part: asdict(facts) for part, facts in parts.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "weights.pt") as path:
        torch.save(peer.network.state_dict(), path)
    write_json(out / "read.json", sorted(data.read), indent=None)
    write_json(out / "trained.json", row)
    return row


def judge_ours(pipeline: str, runs: Path, n: int) -> dict[str, Any]:
    """Samples and judges a folder of runs of this project's as its peers are."""
    loaded = load(runs, pipeline)

    def sample(captions: list[str], options: dict[str, Any]) -> Tensor:
        return loaded.pipeline.sample(captions, batch_size=BATCH, **options)

    table = judged(sample, [{"seed": 0}], captions_read(loaded.paths), n, 0)
    sheet(sample, {"seed": 0}, runs / f"{pipeline}_grid.png")
    row = {"peer": f"{pipeline} of {runs}", "parameters": loaded.parameters, **table}
    write_json(runs / f"{pipeline}_row.json", row)
    return row


def judge(name: str, out: Path, clip: Path | None, n: int, choose_n: int) -> dict[str, Any]:
    """Samples and judges what `train` left in `out`; leaves `row.json` and `grid.png` there."""
    if not (out / "trained.json").exists():
        raise SystemExit(f"{out} holds no training; run `train {name} --out {out}` first.")
    peer = PEERS[name](tokenizer_of_shapes(), clip)
    peer.network.load_state_dict(torch.load(out / "weights.pt", weights_only=True))
    peer.network.eval()
    read = set(json.loads((out / "read.json").read_text()))
    with torch.no_grad():
        table = judged(peer.sample, peer.choices, read, n, choose_n)
        sheet(peer.sample, table["options"], out / "grid.png")
    row = {**json.loads((out / "trained.json").read_text()), **table}
    write_json(out / "row.json", row)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["train", "judge"])
    parser.add_argument("peer", choices=[*PEERS, *OURS], help="one of the last two: judge only")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and rows")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, on the wall's clock")
    parser.add_argument("--clip", type=Path, help="a finished run of model=clip, for dalle2-pytorch")
    parser.add_argument(
        "--lr", action="append", default=[], metavar="PART=RATE", help="another learning rate"
    )
    parser.add_argument("--n", type=int, default=64, help="prompts of each of the four kinds")
    parser.add_argument(
        "--choose-n", type=int, default=16, help="the same, of the validation split, to choose by"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    stand_ins()
    rates = {part: float(rate) for part, _, rate in (given.partition("=") for given in args.lr)}
    try:
        if args.peer in OURS:
            if args.what == "train":
                parser.error(f"train.py trains {args.peer}")
            row = judge_ours(args.peer, args.out, args.n)
        elif args.what == "train":
            row = train(args.peer, args.minutes, args.out, args.clip, rates)
        else:
            row = judge(args.peer, args.out, args.clip, args.n, args.choose_n)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{args.peer} needs {error.name}; install both into an environment of their own."
        ) from error
    print(json.dumps(row))


if __name__ == "__main__":
    main()
