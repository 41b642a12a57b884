"""LAION's prior, imported, gives what lucidrains' dalle2-pytorch gives, of each version that differs."""

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from public import CLOSE, E, FakeCLIP, clip_weights, shaken
from safetensors.torch import save_file
from torch import nn

from dalle.instantiate import instantiate
from dalle.pipelines.load import load_prior
from dalle.run_dir import load_clip, load_stage
from dalle.weights import laion
from dalle.weights.karlo import import_prior
from dalle.weights.reading import PublicWeights
from dalle.weights.writing import check_same

pytest.importorskip("open_clip")
NET = {"dim": E, "depth": 2, "dim_head": 32, "heads": 4, "num_timesteps": 20, "max_text_len": 80,
       "normformer": True}  # fmt: skip


# The published formulas, by themselves: what each version of the package computes, on its own weights. The
# package itself, where it is installed, is the other reference.


class Reference:
    """`DiffusionPriorNetwork.forward` of the package at a version, on a dict of weights by its names."""

    def __init__(self, weights: dict[str, torch.Tensor], heads: int, cosine: bool, unsaid: str) -> None:
        self.w, self.heads, self.cosine, self.unsaid = weights, heads, cosine, unsaid

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * self.w[name]

    def rotated(self, x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        """Pairs of neighbours as complex numbers, turned."""
        d = 2 * len(freqs)
        turns = torch.polar(torch.ones(1), torch.arange(x.shape[-2])[:, None] * freqs)
        pairs = torch.view_as_complex(x[..., :d].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([torch.view_as_real(pairs * turns).flatten(-2), x[..., d:]], -1)

    def bias(self, n: int) -> torch.Tensor:
        table = self.w["causal_transformer.rel_pos_bias.relative_attention_bias.weight"]
        made = torch.full((self.heads, n, n + 1), -math.inf)
        for i in range(n):
            for j in range(i + 2):  # itself, those before it, and the learned key
                back = max(i - j, 0)
                if back >= 16:
                    back = min(16 + int(math.log(back / 16) / math.log(128 / 16) * 16), 31)
                made[:, i, j] = table[back]
        return made

    def attention(self, x: torch.Tensor, name: str, bias: torch.Tensor) -> torch.Tensor:
        x = self.norm(x, f"{name}norm.g")
        q = (x @ self.w[f"{name}to_q.weight"].T).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (x @ self.w[f"{name}to_kv.weight"].T).chunk(2, -1)
        freqs = self.w[f"{name}rotary_emb.freqs"]
        q, k = self.rotated(q, freqs), self.rotated(k, freqs)
        null = self.w[f"{name}null_kv"].expand(len(x), 2, -1)
        k, v = torch.cat([null[:, :1], k], 1), torch.cat([null[:, 1:], v], 1)
        if self.cosine:
            sim = 16 * torch.einsum("bhid,bjd->bhij", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
        else:
            sim = torch.einsum("bhid,bjd->bhij", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("bhij,bjd->bihd", (sim + bias).softmax(-1), v).flatten(2)
        return self.norm(out @ self.w[f"{name}to_out.0.weight"].T, f"{name}to_out.1.g")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x, gate = (self.norm(x, f"{name}0.g") @ self.w[f"{name}1.weight"].T).chunk(2, -1)
        return self.norm(x * F.silu(gate), f"{name}3.g") @ self.w[f"{name}5.weight"].T

    def __call__(self, x, level, text_embed, text_encodings, keep: bool = True) -> torch.Tensor:
        w = self.w
        nulls = w[laion.VERSIONS[0].null if self.unsaid != "ignored" else laion.VERSIONS[-1].null]
        text = F.pad(text_encodings, (0, 0, 0, nulls.shape[1] - text_encodings.shape[1]))
        said = text.ne(0).any(-1, keepdim=True) & (keep or self.unsaid == "ignored")
        text = torch.where(said, text, nulls)
        if not keep and self.unsaid != "ignored":
            x = w["null_image_embed"].expand_as(x)
        if not keep and self.unsaid == "all":
            text_embed = w["null_text_embeds"][0].expand_as(text_embed)
        rows = (text_embed, w["to_time_embeds.0.weight"][level], x, w["learned_query"].expand_as(x))
        h = torch.cat([text, *(row[:, None] for row in rows)], 1)
        bias = self.bias(h.shape[1])
        for i in range(NET["depth"]):
            name = f"causal_transformer.layers.{i}."
            h = h + self.attention(h, f"{name}0.", bias)
            h = h + self.mlp(h, f"{name}1.")
        h = self.norm(h / h.amax(-1, keepdim=True), "causal_transformer.norm.g")
        return (h @ w["causal_transformer.project_out.weight"].T)[:, -1]


def weights_of(code: laion.Version) -> dict[str, torch.Tensor]:
    """Random ones, by the names of a version."""
    torch.manual_seed(0)
    own = laion_net(code)
    made = {name: value.clone() for name, value in shaken(own).state_dict().items()}
    freqs = [name for name in made if name.endswith("freqs")]
    for name in freqs:
        made[name] = 10_000 ** -(torch.arange(0, 32, 2) / 32)
    made[code.null] = made.pop("null_text_encodings")
    return made


def laion_net(code: laion.Version) -> nn.Module:
    from dalle.nets.laion import LaionPrior

    return LaionPrior(
        E, NET["depth"], NET["heads"], NET["dim_head"], NET["max_text_len"], 4 * E, True, False, True, True,
        True, code.cosine, code.unsaid, steps=NET["num_timesteps"],
    )  # fmt: skip


@pytest.fixture
def clip(tmp_path, imported) -> Path:
    """The run of a CLIP with random weights."""
    save_file(clip_weights(), tmp_path / "clip.safetensors")
    return imported("clip", tmp_path / "clip.safetensors", "activation=quick_gelu", name="laion").path


def said_by(clip: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Text features as ours are, and as the package's adapter of OpenAI's CLIP gives them."""
    text = load_clip(clip).embed_captions(["a red square", "two small blue circles"])
    ours = {key: text[key] for key in ("text_embed", "text_hidden", "text_mask")}
    encodings = ours["text_hidden"].masked_fill(~ours["text_mask"][..., None], 0.0)
    return ours, {"text_embed": F.normalize(ours["text_embed"], dim=-1), "text_encodings": encodings}


def version_of(code: laion.Version) -> str:
    return f"version={'.'.join(map(str, code.since))}"


@pytest.mark.parametrize("code", laion.VERSIONS, ids=version_of)
@torch.no_grad()
def test_each_version(tmp_path, imported, clip, code):
    weights = weights_of(code)
    beside = {"clip.clip.logit_scale": torch.ones(1), "noise_scheduler.betas": torch.ones(20)}
    torch.save({f"net.{name}": value for name, value in weights.items()} | beside, tmp_path / "w.pth")
    run = imported("prior", tmp_path / "w.pth", version_of(code), name="laion")
    stage, manifest = load_stage(run.path, "prior")
    assert manifest["origin"]["layout"] == "dalle2-pytorch"
    assert manifest["origin"]["licence"] == "MIT"
    theirs = Reference(weights, NET["heads"], code.cosine, code.unsaid)
    ours, text = said_by(clip)
    x, t = torch.randn(2, E), torch.tensor([1.0, 0.35])
    level = torch.tensor([19, 6])
    for keep in (True, False):
        made = stage.net(x, t, **ours, keep_text=torch.tensor([keep, keep]))
        torch.testing.assert_close(made, theirs(x, level, **text, keep=keep), **CLOSE)


def dalle2_pytorch() -> types.ModuleType:
    package = pytest.importorskip("dalle2_pytorch", reason="the package dalle2-pytorch is not installed")
    return package


@pytest.fixture
def package(tmp_path) -> Callable:
    """A prior of the package itself, around the same CLIP's features."""
    theirs = dalle2_pytorch()
    torch.manual_seed(0)
    net = shaken(theirs.DiffusionPriorNetwork(**NET))
    prior = theirs.DiffusionPrior(net, image_embed_dim=E, timesteps=20, cond_drop_prob=0.1)
    return prior.eval()


@torch.no_grad()
def test_the_package_itself(tmp_path, imported, clip, package):
    """Its network, its whole loop of noising and denoising, guided, and the best of two."""
    version = laion_version()
    torch.save({"version": version, "model": package.state_dict(), "optimizer": {}}, tmp_path / "w.pth")
    stage, _ = load_stage(imported("prior", tmp_path / "w.pth", name="laion").path, "prior")
    ours, text = said_by(clip)
    x = torch.randn(2, E)
    wanted = package.net(x, torch.tensor([19, 6]), **text)
    torch.testing.assert_close(stage.net(x, torch.tensor([1.0, 0.35]), **ours), wanted, **CLOSE)
    none = package.net(x, torch.tensor([19, 6]), **text, text_cond_drop_prob=1.0, image_cond_drop_prob=1.0)
    nobody = torch.zeros(2, dtype=torch.bool)
    torch.testing.assert_close(
        stage.net(x, torch.tensor([1.0, 0.35]), **ours, keep_text=nobody), none, **CLOSE
    )

    torch.manual_seed(7)
    wanted = package.p_sample_loop((2, E), text_cond=text, cond_scale=3.0)
    torch.manual_seed(7)
    made = stage.sample(ours, guidance=3.0, candidates=1)
    torch.testing.assert_close(stage.norm.decode(made), F.normalize(wanted, dim=-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stage.norm.encode(wanted), F.normalize(wanted, dim=-1) * math.sqrt(E))


def laion_version() -> str:
    from dalle2_pytorch.version import __version__

    return __version__


def test_what_a_trainer_says_counts(tmp_path, imported, clip, refused, monkeypatch):
    """Its version (also as an object of a class, which is not imported), its moving average, its settings."""
    new, old = weights_of(laion.VERSIONS[0]), weights_of(laion.VERSIONS[2])
    average = {name: value + 1 for name, value in new.items() if not name.endswith("freqs")}
    average |= {name: value for name, value in new.items() if name.endswith("freqs")}
    content = {
        "version": "1.10.7",
        "model": new,
        "ema_model": average,
        "config": {"prior": {"predict_v": True}},
    }
    torch.save(content, tmp_path / "w.pth")
    stage, _ = load_stage(imported("prior", tmp_path / "w.pth", name="laion").path, "prior")
    torch.testing.assert_close(stage.net.learned_query, average["learned_query"])
    assert stage.denoiser.prediction == "v"

    class Version:  # of the package packaging, as it was pickled then
        def __init__(self, release):
            self._version = Numbers(0, release)

    class Numbers(tuple):
        def __new__(cls, *values):
            return super().__new__(cls, values)

        def __getnewargs__(self):
            return tuple(self)

    module = types.ModuleType("gone")
    for kind in (Version, Numbers):
        kind.__module__, kind.__qualname__ = "gone", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "gone", module)
    torch.save({"version": Version((1, 4, 5)), "model": old}, tmp_path / "old.pth")
    monkeypatch.delitem(sys.modules, "gone")
    stage, _ = load_stage(imported("prior", tmp_path / "old.pth", f"clip={clip}", name="old").path, "prior")
    assert stage.net.unsaid == "ignored"
    assert stage.net.causal_transformer.layers[0][0].cosine

    torch.save(old, tmp_path / "bare.pth")
    line = refused("prior", tmp_path / "bare.pth", f"clip={clip}", name="bare")
    assert "on which its meaning depends (from 0.23.3 on; from 1.4.3 on): give version=..." in line
    line = refused("prior", tmp_path / "bare.pth", f"clip={clip}", "version=1.14.0", name="bare")
    assert "is not of version 1.14.0 of DALLE2-pytorch: it holds null_text_embed" in line
    older = {name: value for name, value in old.items() if name != "null_text_embed"}
    torch.save(older, tmp_path / "older.pth")
    assert "before 0.23" in refused("prior", tmp_path / "older.pth", f"clip={clip}", name="bare")
    line = refused("prior", tmp_path / "bare.pth", f"clip={clip}", "version=1.1.0", "clamp=5", name="bare")
    assert "holds weights of another kind than clamp= is for; leave it out" in line
    content = {"version": "1.12.1", "model": new, "config": {"prior": {"net": {"self_cond": True}}}}
    torch.save(content, tmp_path / "self.pth")
    assert "self_cond=True" in refused("prior", tmp_path / "self.pth", f"clip={clip}", name="bare")


def test_a_folder_as_the_hub_has_it(tmp_path, imported, clip):
    """latest.pth and prior_config.json; and the prior makes embeddings of captions."""
    torch.save(weights_of(laion.VERSIONS[3]), tmp_path / "latest.pth")
    (tmp_path / "prior_config.json").write_text('{"prior": {"net": {"dim": 64}, "predict_x_start": true}}')
    run = imported("prior", tmp_path, "version=1.1.0", name="laion")
    pipeline = load_prior(run.path).pipeline
    made = pipeline.prior.sample(load_clip(clip).embed_captions(["a red square"]))
    torch.testing.assert_close(made.norm(dim=1), torch.tensor([8.0]))  # of unit length, times sqrt(64)


@pytest.mark.parametrize(("depth", "heads"), [(24, 32), (12, 12)])
def test_the_public_shapes(monkeypatch, depth, heads):
    """Of the notebook and of the example, in the package's names where it is installed."""
    theirs = dalle2_pytorch()
    monkeypatch.setattr(laion, "load_clip", lambda path: FakeCLIP(768))
    sizes = {"dim": 768, "depth": depth, "heads": heads, "dim_head": 64, "num_timesteps": 1000}
    with torch.device("meta"):
        public = theirs.DiffusionPriorNetwork(**sizes, max_text_len=77, normformer=True)
    weights = {f"net.{name}": value for name, value in public.state_dict().items()}
    found = import_prior(PublicWeights(Path("laion"), weights), clip="clip", version="1.15.6")
    with torch.device("meta"):
        net = instantiate(found.model["net"])
    check_same(found.tensors, net.state_dict(), Path("public"), "prior")
    assert (found.model["net"]["heads"], found.model["net"]["depth"]) == (heads, depth)


def test_it_trains(tmp_path, imported, clip):
    torch.save(weights_of(laion.VERSIONS[0]), tmp_path / "w.pth")
    stage, _ = load_stage(imported("prior", tmp_path / "w.pth", "version=1.15.6", name="laion").path, "prior")
    stage.train().requires_grad_(True)
    ours, _ = said_by(clip)
    stage.step({**ours, "image_embed": torch.randn(2, E)})["loss"].backward()
    assert [name for name, p in stage.net.named_parameters() if p.grad is None] == []
