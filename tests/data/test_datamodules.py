"""DataModules under a real Trainer: what a batch holds, where embeddings come from, and exact resuming."""

import json
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.progress import _BatchProgress
from torch import nn

from dalle.data.datamodules import (
    CodeDataModule,
    EmbeddingCodeDataModule,
    EmbeddingDataModule,
    ImageDataModule,
    ImageEmbeddingDataModule,
    SourceDataModule,
    TextImageDataModule,
)
from dalle.data.frozen import FrozenCLIP, FrozenTokenizer
from dalle.data.shapes import Shapes
from dalle.data.sources import SourceDataset
from dalle.data.tokenizers import CaptionTokenizer, ClipBPE, tokenizer_facts
from dalle.errors import UserError
from dalle.nets.ar_prior import EmbeddingCodes, dims_for, principal_components

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|logging interval|to create the checkpoint).*")

ALL = {"val_items": None, "test_items": None, "train_items": None}


class Dots:
    """Item i is a picture of one gray; captions name it in up to three ways. Counts the pictures it draws."""

    image_size = 4

    def __init__(self, split, n=23, fixed=True):
        self.n = n if split == "train" else 5
        self.split, self.fixed, self.drawn = split, fixed, 0

    def __len__(self):
        return self.n

    def captions(self, item):
        return [f"{self.split} dot {item} way {k}" for k in range(1 + item % 3)]

    def images(self, items, epoch=0):
        self.drawn += len(items)
        gray = torch.tensor(items, dtype=torch.float32) / self.n + (0 if self.fixed else epoch)
        return gray[:, None, None, None].expand(-1, 3, 4, 4).contiguous()

    def fingerprint(self):
        return f"dots {self.split} {self.n} {self.fixed}"


class Gradients(Dots):
    """Item i is a picture of its own."""

    def images(self, items, epoch=0):
        return torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in items])


class TinyCLIP(nn.Module):
    image_size, embed_dim, text_width, context_length = 4, 6, 5, 12

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.see, self.word, self.read = nn.Linear(48, 6), nn.Embedding(400, 5), nn.Linear(5, 6)

    def encode_image(self, image):
        return self.see(image.flatten(1))

    def encode_text(self, text):
        hidden = self.word(text)
        return self.read(hidden.mean(1)), hidden, text > 0


class Recorder(L.LightningModule):
    """Learns something order-dependent and writes down what it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.ones(()))
        self.seen, self.losses, self.val = [], [], []

    def training_step(self, batch):
        loss = ((self.weight * batch["index"].float() - 3) ** 2).mean() * 1e-3
        self.seen.append((batch["index"].tolist(), batch["caption"]))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch):
        self.val.append(batch["index"].tolist())

    def test_step(self, batch):
        self.val.append(batch["index"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plain(SourceDataModule):
    def __init__(self, source, batch_size, **options):
        super().__init__(source, batch_size, **ALL | options)

    def dataset(self, name):
        return SourceDataset(self.split(name), seed=self.seed if name == "train" else None)


def tokenizer():
    return CaptionTokenizer.train(["train dot 0 way 1 2"], vocab_size=300, context_length=12)


@pytest.fixture
def clip():
    return FrozenCLIP(TinyCLIP(), tokenizer())


def fit(datamodule, steps, ckpt=None, callbacks=(), **trainer):
    module = Recorder()
    trainer["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = L.Trainer(max_steps=steps, callbacks=list(callbacks), **QUIET | trainer)
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt)
    return module, trainer


# Five batches an epoch: 5 and 10 end one, 7 and 13 are inside one.
@pytest.mark.parametrize(("stop", "workers"), [(3, 0), (5, 0), (7, 0), (10, 0), (13, 0), (7, 1)])
def test_stopped_by_max_steps_and_resumed_sees_the_same_batches(tmp_path, stop, workers):
    make = partial(Plain, Dots, batch_size=4, num_workers=workers)
    whole, _ = fit(make(), 16)
    before, trainer = fit(make(), stop)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    after, _ = fit(make(), 16, tmp_path / "last.ckpt")
    assert before.seen + after.seen == whole.seen
    assert before.losses + after.losses == whole.losses
    assert len({str(s) for s in whole.seen}) == 16


@pytest.mark.parametrize(
    ("every", "val"),
    [
        (1, {"limit_val_batches": 0}),
        (2, {"val_check_interval": 3}),
        (4, {}),
        (5, {}),
        (7, {"limit_train_batches": 3}),
    ],
)
def test_any_checkpoint_of_a_running_epoch_resumes_exactly(tmp_path, every, val):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    whole, _ = fit(Plain(Dots, 4), 12, callbacks=[save], **val)
    for steps in range(every, 12, every):
        after, _ = fit(Plain(Dots, 4), 12, tmp_path / f"step={steps}.ckpt", **val)
        assert after.seen == whole.seen[steps:], steps
        assert after.losses == whole.losses[steps:], steps


def test_resumed_twice(tmp_path):
    whole, _ = fit(Plain(Dots, 4), 17)
    parts, ckpt = [], None
    for stop in (3, 8, 9, 17):
        part, trainer = fit(Plain(Dots, 4), stop, ckpt)
        trainer.save_checkpoint(ckpt := tmp_path / f"{stop}.ckpt")
        parts += part.seen
    assert parts == whole.seen


def test_checkpoints_at_the_end_of_epochs_resume_exactly(tmp_path):
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole, _ = fit(Plain(Dots, 4), 14, callbacks=[save])
    for epoch in (0, 1):
        after, _ = fit(Plain(Dots, 4), 14, tmp_path / f"epoch={epoch}.ckpt")
        assert after.seen == whole.seen[5 * (epoch + 1) :]


def test_an_interrupted_batch_is_done_again(tmp_path):
    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                trainer.should_stop = True

    whole, _ = fit(Plain(Dots, 4), 13)
    fit(Plain(Dots, 4), 13, callbacks=[Interrupt()])
    after, _ = fit(Plain(Dots, 4), 13, tmp_path / "last.ckpt")
    assert after.seen == whole.seen[8:]


def test_overfitting_repeats_the_same_batch():
    module, _ = fit(Plain(Dots, 4), 4, overfit_batches=1)
    assert len({str(s) for s in module.seen}) == 1


def test_validation_covers_its_items_in_order_with_first_captions():
    module, _ = fit(Plain(Dots, 4, val_items=3), 5)
    assert [i for batch in module.val for i in batch] == [0, 1, 2]
    assert next(iter(Plain(Dots, 4).val_dataloader()))["caption"][2] == "val dot 2 way 0"


def test_a_batch_larger_than_the_data_names_both_numbers():
    with pytest.raises(UserError, match=r"batch_size=24 .* 23 items"):
        fit(Plain(Dots, 24), 1)
    with pytest.raises(UserError, match="at least 1"):
        Plain(Dots, 0)


def test_text_image_batches():
    datamodule = TextImageDataModule(Dots, tokenizer(), batch_size=4, **ALL)
    batch = next(iter(datamodule.train_dataloader()))
    assert set(batch) == {"image", "caption", "index", "text"}
    assert batch["image"].shape == (4, 3, 4, 4)
    assert torch.equal(batch["text"], tokenizer()(batch["caption"]))
    assert datamodule.sizes["image_size"] == 4
    assert datamodule.sizes["context_length"] == 12
    assert datamodule.sizes["vocab_size"] == tokenizer().vocab_size


def test_a_tokenizer_is_trained_on_the_training_captions():
    train = partial(CaptionTokenizer.train, vocab_size=280, context_length="auto")
    datamodule = TextImageDataModule(Dots, train, batch_size=4, **ALL)
    own = CaptionTokenizer.train([c for i in range(23) for c in Dots("train").captions(i)], 280, "auto")
    assert tokenizer_facts(datamodule.tokenizer) == tokenizer_facts(own)


def embedding_batches(datamodule, kind="train"):
    """Batches as a stage gets them."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader = datamodule.train_dataloader() if kind == "train" else datamodule.val_dataloader()
    return [datamodule.on_after_batch_transfer(batch, 0) for batch in loader]


def same(one, other):
    assert set(one) == set(other)
    assert one["caption"] == other["caption"]
    for name in set(one) - {"caption"}:
        # Text states are kept in half precision.
        tolerance = {"atol": 2e-3, "rtol": 2e-3} if name == "text_hidden" else {"atol": 1e-6, "rtol": 1e-5}
        assert one[name].dtype == other[name].dtype
        torch.testing.assert_close(one[name], other[name], **tolerance)


@pytest.mark.parametrize("kind", ["train", "val"])
@pytest.mark.parametrize("module", [EmbeddingDataModule, ImageEmbeddingDataModule])
def test_cached_and_fresh_embeddings_are_the_same(tmp_path, clip, module, kind):
    cached = embedding_batches(module(Dots, clip, 4, tmp_path, **ALL), kind)
    fresh = embedding_batches(module(Dots, clip, 4, tmp_path, cache_items=0, **ALL), kind)
    no_text = embedding_batches(module(Dots, clip, 4, tmp_path, cache_text_gb=0.0, **ALL), kind)
    expected = {"image_embed", "text_embed", "text_hidden", "text_mask", "text", "caption", "index"}
    assert set(cached[0]) == expected | ({"image"} if module is ImageEmbeddingDataModule else set())
    assert len(cached) == len(fresh) == len(no_text) > 1
    for one, other, third in zip(cached, fresh, no_text, strict=True):
        same(one, other)
        same(one, third)
        length = one["image_embed"].norm(dim=-1)
        torch.testing.assert_close(length, torch.full_like(length, 0.5375 * 6**0.5))


def test_embeddings_belong_to_their_items_and_captions(tmp_path, clip):
    datamodule = EmbeddingDataModule(Dots, clip, 4, tmp_path, image_embed_norm="none", **ALL)
    for batch in embedding_batches(datamodule):
        raw = clip.embed_image(Dots("train").images(batch["index"].tolist()))
        torch.testing.assert_close(batch["image_embed"], raw)
        torch.testing.assert_close(batch["text_embed"], clip.embed_captions(batch["caption"])["text_embed"])


def test_with_a_cache_no_picture_is_read(tmp_path, clip):
    embedding_batches(EmbeddingDataModule(Dots, clip, 4, tmp_path, **ALL))
    again = EmbeddingDataModule(Dots, clip, 4, tmp_path, **ALL)
    embedding_batches(again)
    embedding_batches(again, "val")
    assert again.split("train").drawn == again.split("val").drawn == 0


def test_pictures_that_change_are_never_cached(tmp_path, clip):
    datamodule = EmbeddingDataModule(partial(Dots, fixed=False), clip, 4, tmp_path, **ALL)
    embedding_batches(datamodule)
    assert list(tmp_path.iterdir()) == []
    assert datamodule.split("train").drawn == 20


@pytest.mark.parametrize("cache_items", [0, 100])
def test_standardized_is_fitted_on_training_embeddings(tmp_path, clip, cache_items):
    datamodule = EmbeddingDataModule(
        Dots, clip, 4, tmp_path, image_embed_norm="standardized", cache_items=cache_items, **ALL
    )
    embedding_batches(datamodule)
    raw = clip.embed_image(Dots("train").images(range(23)))
    assert datamodule.norm.mean is not None
    torch.testing.assert_close(datamodule.norm.mean, raw.mean(0))
    torch.testing.assert_close(datamodule.norm.std, raw.std(0, correction=0))


@pytest.mark.parametrize("cache_items", [0, 100])
def test_codes_of_embeddings_are_fitted_on_training_pairs(tmp_path, clip, cache_items):
    """Before there is a Trainer: the number of their dimensions is a size of the network."""
    datamodule = EmbeddingCodeDataModule(
        Gradients, clip, 4, tmp_path, cache_items=cache_items, kept_variance=0.9, buckets=8, **ALL
    )
    source = Gradients("train")
    embeds = datamodule.norm.encode(clip.embed_image(source.images(range(23))))
    captions = [item["caption"][0] for item in map(datamodule.dataset("train").__getitem__, range(23))]
    variances = principal_components(embeds)[1]
    dims = dims_for(variances, 0.9)
    assert 1 < dims < 6
    assert datamodule.sizes["dims"] == dims
    assert datamodule.sizes["buckets"] == 8
    text = clip.embed_captions(captions)["text_embed"]
    expected = EmbeddingCodes(6, dims, 8).fit(embeds, torch.cosine_similarity(embeds, text))
    assert datamodule.codes.state_dict().keys() == expected.state_dict().keys()
    for name, values in expected.state_dict().items():
        torch.testing.assert_close(datamodule.codes.state_dict()[name], values, rtol=1e-4, atol=1e-5)


def test_the_number_of_dimensions_may_be_given(tmp_path, clip):
    datamodule = EmbeddingCodeDataModule(Gradients, clip, 4, tmp_path, dims=2, **ALL)
    assert datamodule.sizes["dims"] == 2
    assert not list(tmp_path.iterdir())  # nothing had to be embedded
    assert datamodule.codes.dims == 2
    with pytest.raises(UserError, match=r"datamodule.dims=7, but CLIP's embeddings have 6 dimensions"):
        EmbeddingCodeDataModule(Gradients, clip, 4, tmp_path, dims=7, **ALL)


def test_a_test_alone_embeds_no_training_set(tmp_path, clip):
    datamodule, module = EmbeddingDataModule(Dots, clip, 4, tmp_path, **ALL), Recorder()
    L.Trainer(**QUIET).test(module, datamodule=datamodule, verbose=False)
    assert [i for batch in module.val for i in batch] == list(range(5))
    assert list(tmp_path.iterdir()) == []


def test_sizes_and_description(tmp_path, clip):
    datamodule = ImageEmbeddingDataModule(Dots, clip, 4, tmp_path, **ALL | {"val_items": 3})
    assert datamodule.sizes == {
        "image_size": 4,
        "vocab_size": clip.tokenizer.vocab_size,
        "context_length": 12,
        "embed_dim": 6,
        "text_width": 5,
    }
    facts = json.loads(json.dumps(datamodule.describe()))
    assert facts["clip"]["weights"] == clip.weights_hash
    assert facts["data"]["items"] == {"train": 23, "val": 3, "test": 5}
    assert facts["image_embed_norm"] == {"kind": "unit_times_sqrt_dim"}


def test_embedding_batches_under_a_trainer_with_workers(tmp_path, clip):
    datamodule = EmbeddingDataModule(Dots, clip, 4, tmp_path, num_workers=1, **ALL)
    module, _ = fit(datamodule, 7)
    plain, _ = fit(Plain(Dots, 4), 7)
    assert module.seen == plain.seen


def test_train_items_bounds_what_is_trained_on():
    data = Plain(Dots, batch_size=4, train_items=10)
    assert data.items("train") == 10
    assert len(data.split("train")) == 23
    data.dataset = lambda name: SourceDataset(data.split(name))
    batches = list(data.train_dataloader())
    seen = torch.cat([batch["index"] for batch in batches])
    assert len(batches) == 2
    assert int(seen.max()) < 10


class Cells(nn.Module):
    """Four codes a picture: its gray level, in 64 steps, in each quarter."""

    image_size, vocab_size, grid = 4, 64, 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, image):
        return (image[:, 0, ::2, ::2].flatten(1) * 50).long()

    def decode(self, codes):
        return (
            (codes / 50)
            .view(-1, 1, 2, 2)
            .repeat_interleave(2, 2)
            .repeat_interleave(2, 3)
            .expand(-1, 3, -1, -1)
        )


class Coded(Recorder):
    """Writes down the text and codes it saw, too."""

    def training_step(self, batch):
        assert batch.keys() - {"image"} == {"index", "caption", "text", "codes"}
        assert torch.equal(batch["codes"], (batch["index"].float() / 23 * 50).long()[:, None].expand(-1, 4))
        loss = super().training_step(batch)
        self.seen[-1] += (batch["text"].tolist(), "image" in batch)
        return loss

    def validation_step(self, batch):
        assert batch.keys() == {"index", "caption", "text", "codes", "image"}
        super().validation_step(batch)

    test_step = validation_step


def coded(tmp_path, make=tokenizer, source=Dots, **options) -> CodeDataModule:
    options = {"batch_size": 5, **ALL, "val_items": 3, "bpe_dropout": 0.1, **options}
    return CodeDataModule(source, make(), FrozenTokenizer(Cells()), cache_dir=tmp_path, **options)


def fit_coded(datamodule, steps, ckpt=None, **trainer):
    module = Coded()
    trainer = L.Trainer(max_steps=steps, **QUIET | trainer)
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt)
    return module, trainer


def test_codes_come_from_the_cache_or_are_made_on_the_way_the_same(tmp_path):
    cached, trainer = fit_coded(coded(tmp_path / "kept"), 9)
    fresh, _ = fit_coded(coded(tmp_path / "none", cache_items=0), 9)
    assert not (tmp_path / "none").exists()
    assert len(list((tmp_path / "kept").iterdir())) == 2  # train and val
    assert [row[:3] for row in cached.seen] == [row[:3] for row in fresh.seen]
    assert {row[3] for row in cached.seen} == {False}  # pictures are not even read
    trainer.test(cached, datamodule=coded(tmp_path / "kept"), verbose=False)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_text_drops_merges_in_training_alone(tmp_path):
    data = coded(tmp_path, bpe_dropout=0.5)
    module, _ = fit_coded(data, 12)
    written = [
        (caption, row)
        for _, captions, text, _ in module.seen
        for caption, row in zip(captions, text, strict=True)
    ]
    plain = {caption: data.tokenizer([caption])[0].tolist() for caption, _ in written}
    assert 0 < sum(row == plain[caption] for caption, row in written) < len(written)
    again, _ = fit_coded(coded(tmp_path, bpe_dropout=0.5), 12)
    assert again.seen == module.seen
    val = next(iter(data.val_dataloader()))
    assert torch.equal(val["text"], data.tokenizer(val["caption"]))


def test_sizes_and_facts_of_codes(tmp_path):
    data = coded(tmp_path)
    vocab = data.tokenizer.vocab_size
    assert data.sizes == {
        "image_size": 4, "text_vocab": vocab, "text_length": 12, "image_vocab": 64, "image_levels": None,
        "grid": 2
    }  # fmt: skip
    facts = data.describe()
    weights = data.image_tokenizer.weights_hash
    assert facts["image_tokenizer"] == {"weights": weights, "vocab_size": 64, "grid": 2}
    assert facts["tokenizer"] == tokenizer_facts(data.tokenizer)
    assert json.loads(json.dumps(facts)) == facts
    codes = torch.tensor([[0, 1, 2, 50]])
    assert torch.equal(data.pictures(codes)[0, 0, ::2, ::2].flatten(), codes[0] / 50)


def test_pictures_of_another_size_do_not_fit_the_image_tokenizer(tmp_path):
    class Large(Dots):
        image_size = 8

    with pytest.raises(
        UserError, match=r"pictures of 8 px do not fit the image tokenizer.* at 4 px; set data.im"
    ):
        _ = coded(tmp_path, source=Large).sizes


def test_captions_that_are_cut_are_counted_once(tmp_path):
    short = partial(CaptionTokenizer.train, ["train dot 0 way 1 2"], 300, 7)
    captions = [c for i in range(23) for c in Dots("train").captions(i)]
    count = sum(map(short().too_long, captions))
    assert 0 < count < len(captions)
    data = coded(tmp_path, short)
    with pytest.warns(
        UserWarning, match=rf"^{count} of {len(captions)} captions are longer than the 7 tokens"
    ):
        data.prepare_data()


def test_clips_tokenizer_has_no_dropout(tmp_path):
    pytest.importorskip("open_clip")
    with pytest.raises(
        UserError, match=r"CLIP's own tokenizer knows no dropout; set datamodule.bpe_dropout=0"
    ):
        coded(tmp_path, ClipBPE)
    assert coded(tmp_path, ClipBPE, bpe_dropout=0).sizes["text_length"] == 77


def place_of(data, world, rank=0):
    """A stand-in for a Trainer of so many ranks, with Lightning's own count of batches."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=_BatchProgress()))
    data.trainer = SimpleNamespace(
        world_size=world, global_rank=rank, overfit_batches=0, limit_train_batches=1.0,
        accumulate_grad_batches=1, fit_loop=loop,
    )  # fmt: skip
    return data.trainer.fit_loop.epoch_loop.batch_progress


@pytest.mark.parametrize(
    ("before", "now", "seen", "begins"), [(1, 2, 3, 2), (2, 1, 2, 4), (4, 3, 1, 2), (2, 2, 2, 2)]
)
def test_on_other_ranks_no_item_comes_twice_in_an_epoch(before, now, seen, begins):
    """40 items in batches of 4: places in an epoch count in items, whatever the ranks."""

    def module():
        return ImageDataModule(
            partial(Shapes, image_size=16, size=40), 4, val_items=None, test_items=None, train_items=None
        )

    epochs = []
    for rank in range(before):
        data = module()
        progress = place_of(data, before, rank)
        loader = data.train_dataloader()
        epochs.append([batch["index"].tolist() for batch, _ in zip(loader, range(seen), strict=False)])
        for count in (progress.total, progress.current):
            count.ready = count.started = count.processed = count.completed = seen
        state = data.state_dict()
    assert state == {"epoch": 0, "items": 4 * before * seen, "batches": seen, "world": before}
    rest = []
    for rank in range(now):
        data = module()
        progress = place_of(data, now, rank)
        for count in (progress.total, progress.current):
            count.ready = count.started = count.processed = count.completed = seen
        data.load_state_dict(state)
        rest.append([batch["index"].tolist() for batch in data.train_dataloader()])
        assert progress.current.ready == progress.current.completed == begins
        progress.total.processed += len(rest[-1])
        assert data.state_dict()["epoch"] == 1
        assert data.state_dict()["items"] == 0
    items = [item for batches in (*epochs, *rest) for batch in batches for item in batch]
    assert len(items) == len(set(items))
    assert len(items) > 40 - 2 * 4 * max(before, now)


@pytest.mark.parametrize(
    ("gpus", "cores", "workers"), [(0, 16, 0), (1, 16, 8), (1, 4, 3), (4, 16, 3), (2, 1, 0)]
)
def test_a_gpu_does_not_wait_for_pictures(gpus, cores, workers, monkeypatch):
    """As many processes as a GPU's share of the cores allows, batches ahead; none without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("dalle.data.datamodules.cores", lambda: cores)
    data = ImageDataModule(
        partial(Shapes, image_size=16, size=40), 4, val_items=None, test_items=None, train_items=None
    )
    loader = data.train_dataloader()
    assert loader.num_workers == workers
    assert loader.pin_memory == (gpus > 0)
    assert loader.persistent_workers == (workers > 0)
    assert (
        ImageDataModule(
            partial(Shapes, image_size=16, size=40), 4, 1, val_items=None, test_items=None, train_items=None
        ).num_workers
        == 1
    )  # as asked for
