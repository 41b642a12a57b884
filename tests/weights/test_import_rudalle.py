"""ruDALL-E, imported, gives the logits of Sber's package `rudalle`, and of the formulas that it published."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from public import CLOSE, TAMING, Released, shaken
from torch import nn

from dalle.autoregressive.sampling import generate
from dalle.data.tokenizers import YttmBPE
from dalle.instantiate import instantiate
from dalle.nets.rudalle import RuDalle, sparse_mask
from dalle.pipelines.load import load_dalle
from dalle.run_dir import load_stage
from dalle.weights import dalle_mini, rudalle
from dalle.weights.reading import PublicWeights
from dalle.weights.writing import check_same

GRID, TEXT, CODES, HEADS = 12, 8, 32, 2  # the convolution reaches 5 to each side: its edges count
SIZES = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": HEADS, "text_seq_length": TEXT,
         "image_tokens_per_dim": GRID, "image_vocab_size": CODES}  # fmt: skip
LETTERS = "\u2581abckot\u043a\u043e\u0442"
MERGES = [("\u2581", "\u043a"), ("\u043e", "\u0442"), ("\u2581\u043a", "\u043e\u0442"), ("\u2581", "c"),
          ("a", "t"), ("\u2581c", "at")]  # fmt: skip
versions = pytest.mark.parametrize("version", ["v2", "v3"])


def model_of() -> tuple[str, dict[str, int]]:
    """bpe.model, and the ids of what it can write."""
    ids = {letter: 4 + i for i, letter in enumerate(LETTERS)}
    lines = [f"{ord(letter)} {i}" for letter, i in ids.items()]
    for a, b in MERGES:
        ids[a + b] = 4 + len(ids)
        lines.append(f"{ids[a]} {ids[b]} {ids[a + b]}")
    return "\n".join([f"{len(LETTERS)} {len(MERGES)}", *lines, "1 0 2 3"]) + "\n", ids


VOCABULARY = 4 + len(LETTERS) + len(MERGES)


# The published formulas, by themselves, on weights by the package's names


def visible(kind: str, at: int, to: int, version: str) -> bool:
    """Whether a place sees another: of the masks' loops what is left for two places."""
    if to > at or to < TEXT:
        return to <= at
    (row, column), (other_row, other_column) = divmod(at - TEXT, GRID), divmod(to - TEXT, GRID)
    if kind == "row":
        return at - to <= GRID
    if kind == "col":
        return column == other_column
    steps = range(-5, 6)
    if version == "v2":
        return any((other_row + r) % GRID == row for r in steps) and any(
            (other_column + c) % GRID == column for c in steps
        )
    return abs(row - other_row) <= 5 and abs(column - other_column) <= 5


def reference(w: dict[str, torch.Tensor], version: str, text: torch.Tensor, codes: torch.Tensor):
    """Logits of all codes."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    text = torch.where(text == 0, torch.arange(VOCABULARY, VOCABULARY + TEXT), text)
    if version == "v2":
        text = torch.cat([torch.full_like(text[:, :1], 2), text], 1)
    x = w["text_embeddings.weight"][text] + w["text_pos_embeddings.weight"][: text.shape[1]]
    rows, columns = (part.flatten() for part in torch.meshgrid(*[torch.arange(GRID)] * 2, indexing="ij"))
    places = w["image_row_embeddings.weight"][rows] + w["image_col_embeddings.weight"][columns]
    x = torch.cat([x, (w["image_embeddings.weight"][codes] + places)[:, :-1]], 1)
    n, depth = x.shape[1], SIZES["num_layers"]
    for i in range(depth):
        kind = "col" if (i - 1) % 4 == 0 else "row" if i < depth - 1 else "conv"
        mask = torch.tensor([[visible(kind, a, b, version) for b in range(n)] for a in range(n)])
        name = f"transformer.layers.{i}."
        parts = linear(norm(x, f"{name}input_layernorm"), f"{name}attention.query_key_value").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        out = linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}attention.dense")
        x = x + norm(out, f"{name}before_first_addition_layernorm")
        h = linear(norm(x, f"{name}post_attention_layernorm"), f"{name}mlp.dense_h_to_4h")
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + norm(linear(h, f"{name}mlp.dense_4h_to_h"), f"{name}before_second_addition_layernorm")
    h = linear(norm(norm(x, "transformer.final_layernorm"), "to_logits.0"), "to_logits.1")
    return h[:, text.shape[1] - 1 :, -CODES:]


def own_weights(version: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = RuDalle(VOCABULARY, TEXT, CODES, GRID, 32, SIZES["num_layers"], HEADS, version)
    masks = {name: sparse_mask(kind, TEXT, GRID, version) for kind, name in rudalle.MASKS.items()}
    return dict(shaken(net).state_dict()) | masks


@pytest.fixture
def upstream(tmp_path, imported) -> list[str]:
    """The image tokenizer's run and the captions' tokenizer, as settings."""
    sizes = TAMING | {"ch_mult": (1, 1, 1), "attn_resolutions": [], "z_channels": 32}
    vqgan = Released(sizes, 4 * GRID, CODES, gumbel=True)
    torch.save(vqgan.state_dict(), tmp_path / "vqgan.ckpt")
    run = imported("vqgan", tmp_path / "vqgan.ckpt", f"image_size={4 * GRID}", name="ru")
    (tmp_path / "bpe.model").write_text(model_of()[0], encoding="utf-8")
    return [f"image_tokenizer={run.path}", f"tokenizer={tmp_path / 'bpe.model'}", f"heads={HEADS}"]


def captions() -> torch.Tensor:
    return torch.tensor([[2, 19, 22, 3, 0, 0, 0, 0], [2, 5, 3, 0, 0, 0, 0, 0]])


def assert_gives(net, wanted: torch.Tensor, codes: torch.Tensor) -> None:
    """At once, and one code at a time."""
    text = captions()
    torch.testing.assert_close(net(text, codes)[1], wanted, **CLOSE)
    for first in (0, 3):
        logits, cache = net.prefill(text, None, codes[:, :first])
        torch.testing.assert_close(logits, wanted[:, first], **CLOSE)
        for rank in range(first, first + 40):
            logits = net.step(codes[:, rank], rank, cache)
            torch.testing.assert_close(logits, wanted[:, rank + 1], **CLOSE)


@versions
@torch.no_grad()
def test_the_formulas(tmp_path, imported, upstream, version):
    weights = own_weights(version)
    torch.save(weights, tmp_path / "w.bin")
    run = imported("dalle", tmp_path / "w.bin", *upstream, name="ru")  # the masks say which version it is
    stage, manifest = load_stage(run.path, "dalle")
    assert (stage.net.version, manifest["origin"]["licence"]) == (version, "Apache-2.0")
    codes = torch.randint(CODES, (2, GRID**2), generator=torch.Generator().manual_seed(1))
    assert_gives(stage.net, reference(weights, version, captions(), codes), codes)


@pytest.fixture
def package(monkeypatch) -> types.ModuleType:
    """`rudalle.dalle.model`; what the package imports beside it asks for old versions of everything."""
    spec = importlib.util.find_spec("rudalle")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package rudalle is not installed")
    place = Path(next(iter(spec.submodule_search_locations)))
    for name, folder in (("rudalle", place), ("rudalle.dalle", place / "dalle")):
        empty = types.ModuleType(name)
        empty.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, empty)
    return importlib.import_module("rudalle.dalle.model")


def theirs(package, version: str, **changes) -> nn.Module:
    dropouts = dict.fromkeys(["embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"], 0.1)
    cogview = {"cogview_sandwich_layernorm": True, "cogview_pb_relax": True, "hf_version": version}
    sizes = SIZES | {"vocab_size": VOCABULARY + TEXT} | dropouts | cogview | changes
    return package.DalleModel("cpu", **sizes)


@versions
@torch.no_grad()
def test_the_package_itself(tmp_path, imported, upstream, package, version):
    """Its logits, and the likeliest codes one after another."""
    torch.manual_seed(0)
    net = shaken(theirs(package, version))
    torch.save(net.state_dict(), tmp_path / "w.bin")
    stage, _ = load_stage(imported("dalle", tmp_path / "w.bin", *upstream, name="ru").path, "dalle")
    codes = torch.randint(CODES, (2, GRID**2), generator=torch.Generator().manual_seed(1))
    size = TEXT + GRID**2
    everything = torch.ones(2, 1, size, size).tril()
    logits, _ = net(torch.cat([captions(), codes], 1), everything)
    before = TEXT - (version == "v3")
    assert_gives(stage.net, logits[:, before : before + GRID**2, -CODES:], codes)
    stream = captions()
    for _ in range(6):
        logits, _ = net(stream, everything)
        stream = torch.cat([stream, logits[:, -1:, -CODES:].argmax(-1)], 1)
    known = torch.cat([torch.full((2, 6), -1), torch.zeros(2, GRID**2 - 6, dtype=torch.int64)], 1)
    drawn = generate(stage.net, captions(), temperature=0, known=known)
    assert torch.equal(drawn[:, :6], stream[:, TEXT:])


def test_ids_of_captions():
    """By hand. Unknown letters in a row are one token, and a long caption loses its end."""
    model, ids = model_of()
    tokenizer = YttmBPE(model, TEXT)
    assert tokenizer(["  \u041a\u041e\u0422\tcat "])[0].tolist() == [
        2, ids["\u2581\u043a\u043e\u0442"], ids["\u2581cat"], 3, 0, 0, 0, 0
    ]  # fmt: skip
    assert tokenizer(["cxyzt"])[0].tolist() == [2, ids["\u2581c"], 1, ids["t"], 3, 0, 0, 0]
    assert tokenizer([""])[0].tolist() == [2, 3, 0, 0, 0, 0, 0, 0]
    assert tokenizer(["b b b b"])[0].tolist() == [2, *[ids["\u2581"], ids["b"]] * 3, ids["\u2581"]]
    assert tokenizer.too_long("b b b b")
    assert not tokenizer.too_long("cat cat")
    again = YttmBPE.from_dict(tokenizer.to_dict())
    assert again(["cat"]).tolist() == tokenizer(["cat"]).tolist()


def test_what_does_not_fit(tmp_path, upstream, refused):
    weights = own_weights("v2")
    torch.save(weights, tmp_path / "w.bin")
    images, bpe, heads = upstream
    assert "give tokenizer=bpe.model" in refused("dalle", tmp_path / "w.bin", images, heads, name="ru")
    assert "give heads=" in refused("dalle", tmp_path / "w.bin", images, bpe, name="ru")
    line = refused("dalle", tmp_path / "w.bin", *upstream, "version=v3", name="ru")
    assert "has other masks than those of version v3" in line
    bare = {name: value for name, value in weights.items() if not name.endswith("_mask")}
    torch.save(bare, tmp_path / "bare.bin")
    assert "give version=v3 for Malevich" in refused("dalle", tmp_path / "bare.bin", *upstream, name="ru")
    (tmp_path / "other.model").write_text("1 0 65 4 1 0 2 3")
    line = refused(
        "dalle", tmp_path / "w.bin", images, heads, f"tokenizer={tmp_path / 'other.model'}", name="ru"
    )
    assert "is no model of YouTokenToMe (its ids are not those from 4 on, each once)" in line
    torch.save(weights | {"image_row_embeddings.weight": torch.zeros(16, 32)}, tmp_path / "large.bin")
    line = refused("dalle", tmp_path / "large.bin", *upstream, name="ru")
    assert "writes 256 codes of 32, but" in line
    assert "has 144 codes of 32 in a picture" in line


def test_a_picture(tmp_path, imported, upstream):
    torch.save(own_weights("v3"), tmp_path / "w.bin")
    run = imported("dalle", tmp_path / "w.bin", *upstream, name="ru")
    stage, _ = load_stage(run.path, "dalle")
    stage.train().requires_grad_(True)
    stage.step({"text": captions(), "codes": torch.randint(CODES, (2, GRID**2))})["loss"].backward()
    assert all(p.grad is not None for p in stage.net.parameters())
    made = load_dalle(run.path).pipeline.sample(["cat"])
    assert made.shape == (1, 3, 4 * GRID, 4 * GRID)


@pytest.mark.parametrize("kandinsky", [False, True])
def test_the_public_shapes(monkeypatch, package, kandinsky):
    class Images:
        grid, vocab_size, image_size, weights_hash = 32, 8192, 256, "0" * 16

    bpe = YttmBPE(model_of()[0], 128)
    bpe.vocab_size = 16384
    monkeypatch.setattr(rudalle, "load_image_tokenizer", lambda path: Images)
    monkeypatch.setattr(rudalle, "read_tokenizer", lambda *_: bpe)
    size = (64, 3840, 60) if kandinsky else (24, 2048, 16)
    public = dict(zip(("num_layers", "hidden_size", "num_attention_heads"), size, strict=True))
    public |= {"text_seq_length": 128, "image_tokens_per_dim": 32, "image_vocab_size": 8192}
    for kind in ("row", "col", "conv"):  # 1152 x 1152, by loops
        monkeypatch.setattr(
            sys.modules["rudalle.dalle.transformer"], f"get_{kind}_mask", lambda *_, **__: None
        )
    with torch.device("meta"):
        net = theirs(package, "v3", vocab_size=16384 + 128, **public)
    weights = net.state_dict()
    found = dalle_mini.import_dalle(
        PublicWeights(Path("rudalle"), weights), "vqgan", tokenizer="bpe.model", version="v3"
    )
    with torch.device("meta"):
        ours = instantiate(found.model["net"])
    check_same(found.tensors, ours.state_dict(), Path("public"), "dalle")
    assert (found.model["net"]["heads"], found.model["net"]["depth"]) == (size[2], size[0])
