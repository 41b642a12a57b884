"""One DataModule per kind of batch, all over the same sources.

Frozen networks (CLIP, image tokenizers) live here and not in a stage, so that a stage's checkpoint, EMA and
DDP hold only what is trained. What they make of a fixed, small enough split is kept on disk (`cache.py`,
`codes.py`); the rest is computed on the device after the batch has arrived there.
"""

import signal
from collections.abc import Callable
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from dalle.data.buckets import Buckets, nearest, shapes, with_enough
from dalle.data.code_cache import CodeCache, CodeDataset, cached_codes
from dalle.data.embed_norm import EmbedNorm
from dalle.data.embedding_cache import CachedDataset, EmbeddingCache, cached_embeddings, chunks
from dalle.data.encoded import Encoded
from dalle.data.frozen import FrozenCLIP, FrozenTokenizer
from dalle.data.pictures import say
from dalle.data.sources import (
    EpochSampler,
    Source,
    SourceDataset,
    SourceFactory,
    captions_of,
    identity_collate,
)
from dalle.data.tokenizers import ClipBPE, TextTokenizer, tokenizer_facts
from dalle.errors import UserError
from dalle.images import from_uint8
from dalle.machine import cores
from dalle.nets.ar_prior import EmbeddingCodes, dims_for, principal_components
from dalle.ranges import (
    AutoWorkers,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Place,
    PositiveInt,
    Seed,
    Share,
    Vocabulary,
)

TOKENIZER_ITEMS = 20_000  # items whose captions train a tokenizer
NORM_ITEMS = 10_000  # items on which an embedding normalisation is fitted
CODES_ITEMS = 50_000  # items on which codes of embeddings are fitted


PREFETCHED = 4  # batches of each worker
MOST_WORKERS = 8


def workers_here() -> int:
    """Processes that read pictures for one GPU of this machine, besides the one that trains; 0 without."""
    if not torch.cuda.is_available():
        return 0
    return max(0, min(MOST_WORKERS, cores() // torch.cuda.device_count() - 1))


STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class ResumableLoader(DataLoader):
    """Tells Lightning that it can be entered amid an epoch: its sampler asks the trainer where."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def __iter__(self) -> Any:
        """Workers begin with signals blocked: one that comes before they are deaf would end them."""
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SourceDataModule(L.LightningDataModule):
    """What all DataModules share: splits made on demand, samplers that know the rank and where a run goes on.

    Args:
        source: makes a split, `source(split="train" | "val" | "test")`.
        batch_size: per rank.
        num_workers: processes that read pictures; 0 = none; auto: as many as cores allow where there is a
            GPU, which should not wait for pictures, else none.
        seed: of the order and of the captions drawn.
        val_items, test_items, train_items: use only the first so many items of these splits.
    """

    clip: FrozenCLIP | None = None  # of those whose batches hold its embeddings
    # Whether pictures may be in buckets; aside: squares are read
    oblong: Literal["no", "aside", "yes"] = "no"

    def __init__(
        self,
        source: SourceFactory,
        batch_size: PositiveInt,
        num_workers: AutoWorkers = "auto",
        seed: Seed = 0,
        *,
        val_items: PositiveInt | None,
        test_items: PositiveInt | None,
        train_items: PositiveInt | None,
    ):
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: give at least 1")
        self.make_source, self.batch_size, self.seed = source, batch_size, seed
        self.num_workers = workers_here() if num_workers == "auto" else num_workers
        self.limits = {"train": train_items, "val": val_items, "test": test_items}
        self._splits: dict[str, Source] = {}
        self._place: Callable[[], tuple[int, int]] | None = None
        self._whole: int | None = None  # of which sides of pictures in buckets are multiples
        self._buckets: dict[tuple[str, int], Buckets] = {}
        self._left: dict[str, int] = {}  # of the checkpoint with which a run goes on

    def split(self, name: str) -> Source:
        """The source of `train`, `val` or `test`."""
        if name not in self._splits:
            source = self.make_source(split=name)
            if getattr(source, "buckets", False):
                self._check_buckets()
            self._splits[name] = source
        return self._splits[name]

    def _check_buckets(self) -> None:
        if self.oblong == "no":
            raise UserError(
                "data.buckets=true keeps the shape of pictures, and this stage's network reads squares; "
                "buckets are for model=decoder and model=upsampler"
            )
        if self.oblong == "aside":
            say("data.buckets=true: CLIP sees squares, so this stage does; decoder and upsampler see shapes")

    @property
    def in_buckets(self) -> bool:
        """Whether batches hold pictures in shapes of their own."""
        return self.oblong == "yes" and getattr(self.split("train"), "buckets", False)

    def suit(self, net: Any) -> None:
        """Takes from a network what sides of pictures in buckets must be multiples of.

        Raises:
            UserError: it takes only squares.
        """
        if self.in_buckets:
            self._buckets.clear()
            self._whole = getattr(net, "whole", None)
            if self._whole is None:
                raise UserError(
                    f"data.buckets=true: {type(net).__name__} draws squares only; leave it out, or take "
                    "another network (model/net=small_unet, unet, dit)"
                )

    def shapes_of(self, name: str) -> Buckets | None:
        """The shapes of a split's pictures. Tests draw and compare squares, as `evaluate` does."""
        if name == "test" or not self.in_buckets:
            return None
        world = self.trainer.world_size if self.trainer else 1
        train: Any = self.split("train")
        if (name, world) not in self._buckets:
            used = train.aspects[: self.items("train")]
            all_shapes = shapes(train.image_size, self._whole or max(1, train.image_size // 8))
            chosen = with_enough(used, all_shapes, self.batch_size * world)
            source: Any = self.split(name)
            made = Buckets(chosen, nearest(source.aspects, chosen))
            self._buckets[name, world] = made
            if name == "train":
                few = len(all_shapes) - len(chosen)
                joined = (
                    f"; {few} shapes with less than a batch are joined to their neighbours" if few else ""
                )
                say(f"buckets, width x height (pictures): {made.told(len(used))}{joined}")
        return self._buckets[name, world]

    def items(self, name: str) -> int:
        """How many items of a split are used."""
        n, limit = len(self.split(name)), self.limits.get(name)
        return n if limit is None else min(n, limit)

    def splits_to_keep(self, most: int) -> list[str]:
        """Those of which it is worth to keep what frozen networks make: of fixed pictures, at `most` so many,
        that are gone through more than once (in a test they are not).
        """
        task = self.trainer.state.fn if self.trainer else None
        names = {"test": (), "validate": ("val",)}.get(task or "", ("train", "val"))
        return [name for name in names if self.split(name).fixed and 0 < self.items(name) <= most]

    def encoded_splits(self) -> dict[str, Encoded]:
        """Those that come with what frozen networks make of them."""
        splits = {name: self.split(name) for name in ("train", "val", "test")}
        return {
            name: source for name, source in splits.items() if isinstance(source, Encoded) and len(source)
        }

    def open_encoded(self) -> None:
        """Opens what frozen networks have made. Raises UserError where it is damaged or of others."""

    def dataset(self, name: str) -> SourceDataset:
        raise NotImplementedError

    def check_batch(self, world: int) -> None:
        """Raises UserError where so many ranks find not a batch each."""
        n = self.items("train")
        if self.batch_size * world > n:
            ranks = f" on each of {world} devices" if world > 1 else ""
            raise UserError(
                f"batch_size={self.batch_size}{ranks} is larger than the training set of {n} items; "
                f"set a batch size of at most {n // world}"
            )

    def train_dataloader(self) -> DataLoader:
        n, world = self.items("train"), self.trainer.world_size if self.trainer else 1
        self.check_batch(world)
        self.open_encoded()
        # Overfitting on a few batches means the same ones, with the same captions, in every epoch.
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        sampler = self._sampler("train", shuffle=not overfit, drop_last=True)
        if self.trainer:
            # Lightning takes a step at an epoch's end, of however many batches are left
            sampler.whole = 1 if overfit else getattr(self.trainer, "accumulate_grad_batches", 1)
            if not len(sampler):
                raise UserError(
                    f"trainer.accumulate_grad_batches={sampler.whole} times {self.batch_size * world} items "
                    f"are more than the training set of {n}; lower it"
                )
            self._place = sampler.position = partial(self._position, len(sampler), overfit)
        return self._loader("train", sampler)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._loader("val", self._sampler("val")) if self.items("val") else []

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._loader("test", self._sampler("test")) if self.items("test") else []

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Pictures travel as the bytes they are in files, and become numbers in [-1, 1] here."""
        for key in ("image", "square"):
            if key in batch and batch[key].dtype == torch.uint8:
                batch[key] = from_uint8(batch[key])
        return batch

    def pictures(self, made: Tensor) -> Tensor:
        """What a stage that makes images made of a batch -> images in [-1, 1]."""
        return made

    @property
    def sizes(self) -> dict[str, int]:
        """What a network on these batches must match."""
        return {"image_size": self.split("train").image_size}

    def describe(self) -> dict[str, Any]:
        """Facts for a run's manifest, JSON-able."""
        names = ("train", "val", "test")
        return {
            "data": {
                "source": type(self.split("train")).__name__,
                "fingerprint": {name: self.split(name).fingerprint() for name in names},
                "items": {name: self.items(name) for name in names},
            },
            "image_size": self.split("train").image_size,
            **({"buckets": buckets.shapes} if (buckets := self.shapes_of("train")) else {}),
        }

    def state_dict(self) -> dict[str, int]:
        """Where training is: in items, as it may go on with other ranks."""
        if self._place is None or self.trainer is None:
            return {}
        epoch, start = self._place()
        world = self.trainer.world_size
        seen: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return {
            "epoch": epoch,
            "items": start * self.batch_size * world,
            "batches": seen.processed,
            "world": world,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._left = dict(state_dict)

    def _position(self, batches: int, overfit: bool) -> tuple[int, int]:
        """Epoch and number of batches seen in it, from the count of batches that Lightning saves.

        Its count of epochs will not do: a run that `max_steps` ended amid an epoch goes on in its middle, but
        under the next number. Called when an iterator is made, which is after a checkpoint has been loaded.
        On other ranks than before a batch has another size: the next begins where all items are new.
        """
        trainer: Any = self.trainer
        limit = trainer.limit_train_batches
        batches = max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))
        progress = trainer.fit_loop.epoch_loop.batch_progress
        left = self._left or {"epoch": 0, "items": 0, "batches": 0, "world": trainer.world_size}
        start = -(-left["items"] // (self.batch_size * trainer.world_size))
        if left["world"] != trainer.world_size:
            whole = trainer.accumulate_grad_batches
            start = min(-(-start // whole) * whole, batches)
        more, start = divmod(start + progress.total.processed - left["batches"], batches)
        if left["world"] != trainer.world_size and progress.total.processed == left["batches"]:
            now = progress.current  # in batches of this size
            now.completed += start - now.processed
            now.ready = now.started = now.processed = start
        return (0 if overfit else left["epoch"] + more), start

    def _sampler(self, name: str, shuffle: bool = False, drop_last: bool = False) -> EpochSampler:
        buckets = self.shapes_of(name)
        return EpochSampler(
            len(self.split(name)),
            self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
            limit=self.limits.get(name),
            order=getattr(self.split(name), "order", None),
            buckets=buckets.numbers if buckets else None,
        )

    def _loader(self, name: str, sampler: EpochSampler) -> DataLoader:
        return ResumableLoader(
            self.dataset(name),
            batch_sampler=sampler,
            collate_fn=identity_collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=PREFETCHED if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_deaf,
            # Its own generator: else every new iterator would shift the noise that training draws.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _deaf(_: int) -> None:
    """What stops a group of processes is for the training itself, which then ends its workers."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class ImageDataModule(SourceDataModule):
    """Batches of `image`, `caption`, `index`: what tokenizers and other autoencoders train on."""

    def dataset(self, name: str) -> SourceDataset:
        return SourceDataset(self.split(name), seed=self.seed if name == "train" else None)


class TextImageDataModule(SourceDataModule):
    """Batches of `image`, `caption`, `index`, `text`: what CLIP trains on.

    Args:
        tokenizer: a tokenizer, or what makes one from a list of captions: those of the training split.
    """

    oblong = "aside"

    def __init__(
        self,
        source: SourceFactory,
        tokenizer: TextTokenizer | Callable[[list[str]], TextTokenizer],
        batch_size: PositiveInt,
        num_workers: AutoWorkers = "auto",
        seed: Seed = 0,
        *,
        val_items: PositiveInt | None,
        test_items: PositiveInt | None,
        train_items: PositiveInt | None,
    ):
        super().__init__(
            source, batch_size, num_workers, seed,
            val_items=val_items, test_items=test_items, train_items=train_items,
        )  # fmt: skip
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> TextTokenizer:
        if not isinstance(self._tokenizer, TextTokenizer):
            train = self.split("train")
            items = range(min(len(train), TOKENIZER_ITEMS))
            self._tokenizer = self._tokenizer(list(chain(*captions_of(train, items))))
        return self._tokenizer

    def prepare_data(self) -> None:
        warn_of_cuts(self)

    def dataset(self, name: str) -> SourceDataset:
        return SourceDataset(self.split(name), self.tokenizer, seed=self.seed if name == "train" else None)

    @property
    def sizes(self) -> dict[str, int]:
        tokenizer = self.tokenizer
        text = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
        return super().sizes | text

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"tokenizer": tokenizer_facts(self.tokenizer)}


def warn_of_cuts(data: "TextImageDataModule | EmbeddingDataModule") -> None:
    """Says once, on one rank, what share of the training captions loses its end."""
    train = data.split("train")
    captions = list(chain(*captions_of(train, range(min(data.items("train"), TOKENIZER_ITEMS)))))
    room = data.tokenizer.context_length - 2
    # A token is a byte at least, so short captions need not be tokenised.
    long = [caption for caption in captions if len(caption.encode()) > room]
    if cut := sum(map(data.tokenizer.too_long, long)):
        make_room = "a CLIP with a longer context" if data.clip else "tokenizer.context_length=..."
        rank_zero_warn(
            f"{cut} of {len(captions)} captions are longer than the {data.tokenizer.context_length} tokens "
            f"of the text and are cut ({cut / len(captions):.0%}); {make_room} makes room"
        )


class EmbeddingDataModule(SourceDataModule):
    """Batches of `image_embed` (normalised), `text_embed`, `text_hidden`, `text_mask`, `text`, `caption`,
    `index`: what a prior trains on. Images are read only to be embedded.

    Args:
        clip: the frozen CLIP whose embeddings these are.
        cache_dir: where embeddings are kept.
        image_embed_norm: none | unit | unit_times_sqrt_dim | unit_variance | standardized | whitened, see
            `EmbedNorm`.
        cache_items: a larger split is embedded batch by batch instead.
        cache_text_gb: captions whose states would take more are embedded batch by batch instead.
    """

    with_images = False
    oblong = "aside"

    def __init__(
        self,
        source: SourceFactory,
        clip: FrozenCLIP,
        batch_size: PositiveInt,
        cache_dir: Place,
        num_workers: AutoWorkers = "auto",
        seed: Seed = 0,
        *,
        val_items: PositiveInt | None,
        test_items: PositiveInt | None,
        train_items: PositiveInt | None,
        image_embed_norm: str = "unit_times_sqrt_dim",
        cache_items: NonNegativeInt = 100_000,
        cache_text_gb: NonNegative = 1.0,
    ):
        super().__init__(
            source, batch_size, num_workers, seed,
            val_items=val_items, test_items=test_items, train_items=train_items,
        )  # fmt: skip
        self.clip: FrozenCLIP = clip  # pyright: ignore[reportIncompatibleVariableOverride]  # never None here
        self.cache_dir = Path(cache_dir)
        self.cache_items, self.text_bytes = cache_items, int(cache_text_gb * 2**30)
        self.norm = EmbedNorm(image_embed_norm)
        self._caches: dict[str, EmbeddingCache | None] = {}

    def prepare_data(self) -> None:
        """One process computes what is kept, before the others look for it."""
        self._embed(verify=True)
        warn_of_cuts(self)

    def setup(self, stage: str) -> None:
        self._embed(verify=False)

    def open_encoded(self) -> None:
        for name, source in self.encoded_splits().items():
            if name not in self._caches:
                self._caches[name] = source.embeddings(self.clip)

    def _embed(self, verify: bool) -> None:
        if self.trainer:
            self.clip.to(self.trainer.strategy.root_device)
        embed = partial(cached_embeddings, self.cache_dir, clip=self.clip, verify=verify)
        self.open_encoded()
        for name in self.splits_to_keep(self.cache_items):
            if name not in self._caches:
                source, n, first_only = self.split(name), self.items(name), name == "val"
                self._caches[name] = embed(
                    source=source, items=n, text_bytes=self.text_bytes, first_only=first_only
                )
        if self.norm.needs_fit:
            train = self._caches.get("train") or embed(
                source=self.split("train"), items=min(NORM_ITEMS, self.items("train")), text_bytes=0
            )
            self.norm.fit(train.images(range(min(NORM_ITEMS, len(train)))))

    def dataset(self, name: str) -> SourceDataset:
        source, seed, buckets = self.split(name), self.seed if name == "train" else None, self.shapes_of(name)
        if cache := self._caches.get(name):
            return CachedDataset(source, cache, self.clip.tokenizer, self.with_images, seed, buckets)
        return SourceDataset(source, self.clip.tokenizer, True, seed, buckets, squares=buckets is not None)

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Adds the embeddings that did not come from a cache, and normalises those of images."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if "image_embed" not in batch:
            self.clip.to(batch["text"].device)
            batch["image_embed"] = self.clip.embed_image(batch.pop("square", batch["image"]))
            if not self.with_images:
                del batch["image"]
        if "text_embed" not in batch:
            self.clip.to(batch["text"].device)
            batch |= self.clip.embed_text(batch["text"])
        batch["image_embed"] = self.norm.encode(batch["image_embed"])
        return batch

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.clip.tokenizer

    @property
    def sizes(self) -> dict[str, int]:
        clip = self.clip
        return super().sizes | {
            "vocab_size": clip.tokenizer.vocab_size,
            "context_length": clip.context_length,
            "embed_dim": clip.embed_dim,
            "text_width": clip.text_width,
        }

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "tokenizer": tokenizer_facts(self.clip.tokenizer),
            "clip": {"weights": self.clip.weights_hash, "embed_dim": self.clip.embed_dim},
            "image_embed_norm": self.norm.to_dict(),
        }


class EmbeddingCodeDataModule(EmbeddingDataModule):
    """The batches of `EmbeddingDataModule`, and what makes codes of their image embeddings: what an
    autoregressive prior trains on.

    Args:
        dims: principal components that are kept; None: as few as keep `kept_variance`.
        kept_variance: share of the variance of normalised image embeddings.
        buckets: values of a code.

    Raises:
        UserError: more dimensions than CLIP's embeddings have.
    """

    def __init__(
        self,
        source: SourceFactory,
        clip: FrozenCLIP,
        batch_size: PositiveInt,
        cache_dir: Place,
        num_workers: AutoWorkers = "auto",
        seed: Seed = 0,
        *,
        val_items: PositiveInt | None,
        test_items: PositiveInt | None,
        train_items: PositiveInt | None,
        image_embed_norm: str = "unit_times_sqrt_dim",
        cache_items: NonNegativeInt = 100_000,
        cache_text_gb: NonNegative = 1.0,
        dims: PositiveInt | None = None,
        kept_variance: Share = 0.99,
        buckets: Vocabulary = 1024,
    ):
        super().__init__(
            source, clip, batch_size, cache_dir, num_workers, seed,
            val_items=val_items, test_items=test_items, train_items=train_items,
            image_embed_norm=image_embed_norm, cache_items=cache_items, cache_text_gb=cache_text_gb,
        )  # fmt: skip
        if dims is not None and dims > clip.embed_dim:
            raise UserError(
                f"datamodule.dims={dims}, but CLIP's embeddings have {clip.embed_dim} dimensions; give at "
                "most so many, or datamodule.kept_variance"
            )
        self.dims, self.kept_variance, self.buckets = dims, kept_variance, buckets

    @cached_property
    def codes(self) -> EmbeddingCodes:
        """Fitted on the training split, or on its first items where it is large."""
        images, dots = self.training_pairs()
        variances = principal_components(images)[1]
        dims = self.dims or dims_for(variances, self.kept_variance)
        kept = (variances[:dims].sum() / variances.sum()).item()
        rank_zero_info(
            f"{dims} of {len(variances)} dimensions keep {kept:.1%} of the variance of {len(images):,} image "
            "embeddings"
        )
        return EmbeddingCodes(len(variances), dims, self.buckets).fit(images, dots)

    def training_pairs(self) -> tuple[Tensor, Tensor]:
        """Normalised image embeddings (n, E), and their dot products with the caption embeddings (n,)."""
        if not self.trainer and torch.cuda.is_available():
            self.clip.to("cuda")  # before there is a Trainer to ask
        self._embed(verify=self.trainer is None)
        dataset, images, dots = self.dataset("train"), [], []
        for items in chunks(min(self.items("train"), CODES_ITEMS)):
            on_device: Any = {
                key: value.to(self.clip.device) if isinstance(value, Tensor) else value
                for key, value in dataset.__getitems__(items).items()
            }
            batch = self.on_after_batch_transfer(on_device, 0)
            images.append(batch["image_embed"].cpu())
            dots.append(self.norm.dot(batch["image_embed"], batch["text_embed"]).cpu())
        return torch.cat(images), torch.cat(dots)

    @property
    def sizes(self) -> dict[str, int]:
        if self.clip.device.type == "meta":  # one that is still to be trained: at most so many
            dims = self.dims or self.clip.embed_dim
        else:
            dims = self.dims or self.codes.dims
        return super().sizes | {"dims": dims, "buckets": self.buckets}


class ImageEmbeddingDataModule(EmbeddingDataModule):
    """The batches of `EmbeddingDataModule` and `image`: what a decoder trains on."""

    with_images = True
    oblong = "yes"


class CodeDataModule(TextImageDataModule):
    """Batches of `text`, `codes`, `caption`, `index`, and `image` in validation and tests: what DALL-E's
    transformer trains on.

    Args:
        image_tokenizer: the frozen network that turns pictures into codes.
        cache_dir: where codes are kept.
        cache_items: a larger split is encoded batch by batch instead.
        bpe_dropout: share of the text tokenizer's merges left out in training.

    Raises:
        UserError: dropout for a tokenizer that has none. Of `sizes`: pictures of another size than the
            image tokenizer's.
    """

    oblong = "no"

    def __init__(
        self,
        source: SourceFactory,
        tokenizer: TextTokenizer | Callable[[list[str]], TextTokenizer],
        image_tokenizer: FrozenTokenizer,
        batch_size: PositiveInt,
        cache_dir: Place,
        num_workers: AutoWorkers = "auto",
        seed: Seed = 0,
        *,
        val_items: PositiveInt | None,
        test_items: PositiveInt | None,
        train_items: PositiveInt | None,
        cache_items: NonNegativeInt = 1_000_000,
        bpe_dropout: Fraction = 0.0,
    ):
        super().__init__(
            source, tokenizer, batch_size, num_workers, seed,
            val_items=val_items, test_items=test_items, train_items=train_items,
        )  # fmt: skip
        self.image_tokenizer, self.cache_dir = image_tokenizer, Path(cache_dir)
        self.cache_items, self.bpe_dropout = cache_items, bpe_dropout
        if bpe_dropout and isinstance(tokenizer, ClipBPE):
            raise UserError("CLIP's own tokenizer knows no dropout; set datamodule.bpe_dropout=0")
        self._caches: dict[str, CodeCache] = {}

    def prepare_data(self) -> None:
        """One process computes what is kept, before the others look for it."""
        self._encode(verify=True)
        warn_of_cuts(self)

    def setup(self, stage: str) -> None:
        self._encode(verify=False)

    def open_encoded(self) -> None:
        for name, source in self.encoded_splits().items():
            if name not in self._caches:
                self._caches[name] = source.codes(self.image_tokenizer)

    def _encode(self, verify: bool) -> None:
        if self.trainer:
            self.image_tokenizer.to(self.trainer.strategy.root_device)
        self.open_encoded()
        for name in self.splits_to_keep(self.cache_items):
            if name not in self._caches:
                source, n = self.split(name), self.items(name)
                self._caches[name] = cached_codes(self.cache_dir, source, self.image_tokenizer, n, verify)

    def dataset(self, name: str) -> SourceDataset:
        train = name == "train"
        return CodeDataset(
            self.split(name),
            self.tokenizer,
            self._caches.get(name),
            images=not train,
            seed=self.seed if train else None,
            dropout=self.bpe_dropout if train else 0.0,
        )

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Adds the codes that did not come from a cache."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if "codes" not in batch:
            self.image_tokenizer.to(batch["text"].device)
            batch["codes"] = self.image_tokenizer.encode(batch["image"])
        return batch

    def pictures(self, made: Tensor) -> Tensor:
        """Codes (B, N) -> images in [-1, 1]."""
        return self.image_tokenizer.to(made.device).decode(made)

    @property
    def sizes(self) -> dict[str, Any]:
        there, needed = self.split("train").image_size, self.image_tokenizer.image_size
        if there != needed:
            raise UserError(
                f"pictures of {there} px do not fit the image tokenizer, which was trained at {needed} px; "
                f"set data.image_size={needed}, or train a tokenizer on pictures of {there} px"
            )
        return {
            "image_size": there,
            "text_vocab": self.tokenizer.vocab_size,
            "text_length": self.tokenizer.context_length,
            "image_vocab": self.image_tokenizer.vocab_size,
            "image_levels": self.image_tokenizer.levels,
            "grid": self.image_tokenizer.grid,
        }

    def describe(self) -> dict[str, Any]:
        images = self.image_tokenizer
        facts = {"weights": images.weights_hash, "vocab_size": images.vocab_size, "grid": images.grid}
        return super().describe() | {"image_tokenizer": facts}


def datamodule_of(trainer: L.Trainer) -> SourceDataModule:
    """The one that a trainer runs with."""
    return trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  # Lightning sets it where it begins
