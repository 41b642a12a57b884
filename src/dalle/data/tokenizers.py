"""Captions to ids: a small byte-level BPE trained on one's own captions, and CLIP's own.

Both lower-case, squeeze white space, put the text between a start and an end token, pad with id 0, and cut
what is too long. The end token has the largest id, which is where CLIP reads off the text's embedding.

BPE dropout (Provilkov et al. 2020, alg. 1) writes a word in other tokens every time it is read; DALL-E trains
with 10 % (Ramesh et al. 2021, sec. 2.2). The `tokenizers` package cannot seed its own, so it is done here.
"""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dalle.errors import UserError
from dalle.files import write_json
from dalle.ranges import Length, Vocabulary, shown
from dalle.reading import read_json
from dalle.schemas import TokenizerFile
from dalle.trust import listed

# Captions are short, one thread is as fast; and threads started before a DataLoader forks make workers warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL = 3  # pad, start, end
AUTO_CONTEXT_CAP = 80  # one caption of a thousand words must not set the length of all
LEARNED_FROM = 10_000  # letters of a caption; time grows with the square of a word's length


@runtime_checkable
class TextTokenizer(Protocol):
    """What a stage's tokenizer offers; ids are 0 (padding) to `end_id` == `vocab_size - 1`."""

    vocab_size: int
    context_length: int
    pad_id: int
    start_id: int
    end_id: int

    def __call__(self, captions: Sequence[str]) -> Int64[Tensor, "b t"]: ...
    def too_long(self, caption: str) -> bool: ...
    def to_dict(self) -> dict[str, Any]: ...


class CaptionTokenizer:
    """A byte-level BPE: any text can be written in it, and frequent words of its captions are one token.

    Made by `CaptionTokenizer.train(captions, ...)` or `from_dict`. Ids: 0 padding, 1 start, then the BPE's
    own (shifted by two, so that no text can spell a special token), last the end.
    """

    pad_id, start_id = 0, 1

    def __init__(self, bpe: Tokenizer, context_length: int) -> None:
        if context_length < 3:
            raise UserError(f"context_length {context_length} leaves no room for text; give at least 3.")
        self.bpe = bpe
        self.context_length = context_length
        self.vocab_size = bpe.get_vocab_size() + SPECIAL
        self.end_id = self.vocab_size - 1

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: Vocabulary, context_length: Length | Literal["auto"]
    ) -> "CaptionTokenizer":
        """Learns at most `vocab_size` ids, the same ones from the same captions.

        `context_length="auto"`: the longest caption, rounded up to a multiple of 8, at most 80.

        Raises:
            UserError: no captions, or a vocabulary too small for the 256 bytes.
        """
        captions = list(captions)
        if not captions:
            raise UserError("no captions to train a tokenizer on.")
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + SPECIAL:
            raise UserError(f"vocab_size {vocab_size} is too small: {len(alphabet) + SPECIAL} at least.")
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        # The space put in front makes a word the same token wherever it stands.
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
        )
        bpe.train_from_iterator((caption[:LEARNED_FROM] for caption in captions), trainer)
        if context_length == "auto":
            longest = max(len(encoding.ids) for encoding in bpe.encode_batch(captions)) + 2
            context_length = min(AUTO_CONTEXT_CAP, 8 * -(-longest // 8))
        return cls(bpe, context_length)

    def __call__(
        self, captions: Sequence[str], dropout: float = 0.0, seeds: Sequence[int] = ()
    ) -> Int64[Tensor, "b t"]:
        """Captions -> (B, context_length) ids; too long ones are cut before the end token.

        Args:
            dropout: share of merges left out, for training only. A caption that would grow too long by it
                is taken as it is.
            seeds: one for each caption, which alone decides what is left out.
        """
        room = self.context_length - 2
        text = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for number, encoding in enumerate(self.bpe.encode_batch(list(captions))):
            ids = encoding.ids
            if dropout and len(ids) <= room:
                finer = self._split(captions[number], dropout, random.Random(seeds[number]))
                ids = finer if len(finer) <= room else ids
            ids = [self.start_id, *(i + 2 for i in ids[:room]), self.end_id]
            text[number, : len(ids)] = torch.tensor(ids)
        return text

    def _split(self, caption: str, dropout: float, draw: random.Random) -> list[int]:
        """The BPE's ids of a caption, of whose merges each is left out with probability `dropout`."""
        assert self.bpe.normalizer is not None
        assert self.bpe.pre_tokenizer is not None
        ids = []
        for word, _ in self.bpe.pre_tokenizer.pre_tokenize_str(self.bpe.normalizer.normalize_str(caption)):
            parts = list(word)
            while merges := [
                (self._ranks[pair], place)
                for place, pair in enumerate(pairwise(parts))
                if pair in self._ranks and draw.random() >= dropout
            ]:
                _, place = min(merges)
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            ids += [self._vocabulary[part] for part in parts]
        return ids

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self.bpe.get_vocab()

    @cached_property
    def _ranks(self) -> dict[tuple[str, ...], int]:
        """Of every merge its place in the order in which they are made."""
        merges = json.loads(self.bpe.to_str())["model"]["merges"]
        return {tuple(pair): rank for rank, pair in enumerate(merges)}

    def too_long(self, caption: str) -> bool:
        """Whether the caption would be cut."""
        return len(self.bpe.encode(caption).ids) + 2 > self.context_length

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "captions", "context_length": self.context_length, "bpe": self.bpe.to_str()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "CaptionTokenizer":
        bpe = Tokenizer.from_str(state["bpe"])
        if sorted(bpe.get_vocab().values()) != list(range(bpe.get_vocab_size())):
            raise ValueError("its ids are not those from 0 on, each once")
        return cls(bpe, state["context_length"])


class ClipBPE:
    """CLIP's own tokenizer with its 49,408 ids, as open_clip brings it.

    Raises:
        UserError: open_clip is not installed.
    """

    pad_id = 0

    def __init__(self, context_length: Length = 77) -> None:
        try:
            from open_clip.tokenizer import SimpleTokenizer
        except ImportError as error:
            raise UserError("CLIP's own tokenizer needs open_clip: pip install dalle[open_clip]") from error
        self.bpe = SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.vocab_size = self.bpe.vocab_size
        self.start_id, self.end_id = self.bpe.sot_token_id, self.bpe.eot_token_id

    def __call__(self, captions: Sequence[str]) -> Int64[Tensor, "b t"]:
        """Captions -> (B, context_length) ids; too long ones are cut and end in the end token."""
        return self.bpe(list(captions))

    def too_long(self, caption: str) -> bool:
        """Whether the caption would be cut."""
        return len(self.bpe.encode(caption)) + 2 > self.context_length

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "clip", "context_length": self.context_length}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "ClipBPE":
        return cls(state["context_length"])


class DalleMiniBPE:
    """The tokenizer of DALL-E mini and mega: a BPE with its own start, padding and end, 0, 1 and 2.

    Text becomes lower-case ASCII; emoji are spelled out where the package `emoji` is installed, else left out
    with all other signs.
    """

    start_id, pad_id, end_id = 0, 1, 2

    def __init__(self, bpe: Tokenizer, vocab_size: Vocabulary, context_length: Length = 64) -> None:
        self.bpe, self.vocab_size, self.context_length = bpe, vocab_size, context_length

    @classmethod
    def of_files(
        cls, vocab: dict[str, int], merges: Sequence[str], vocab_size: Vocabulary, context_length: Length
    ) -> "DalleMiniBPE":
        """Of the words of vocab.json and the lines of merges.txt. Raises ValueError where these are none."""
        if [vocab.get(word) for word in ("<s>", "<pad>", "</s>")] != [0, 1, 2]:
            raise ValueError("its <s>, <pad> and </s> are not 0, 1 and 2")
        pairs: Any = [tuple(line.split()) for line in merges if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a line of the merges is no pair")
        return cls(Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>")), vocab_size, context_length)

    def _ids(self, caption: str) -> list[int]:
        with contextlib.suppress(ImportError):
            from emoji import demojize

            caption = demojize(caption, delimiters=("", ""))
        words = caption.lower().encode("ascii", errors="ignore").decode().split(" ")
        spaced = [f"\u0120{word}" for word in words if word]  # how byte-level BPEs write a space
        return self.bpe.encode(spaced, is_pretokenized=True).ids if spaced else []

    def __call__(self, captions: Sequence[str]) -> Int64[Tensor, "b t"]:
        """Captions -> (B, context_length) ids; too long ones are cut before the end token."""
        text = torch.full((len(captions), self.context_length), self.pad_id, dtype=torch.int64)
        for row, caption in zip(text, captions, strict=True):
            ids = [self.start_id, *self._ids(caption)[: self.context_length - 2], self.end_id]
            row[: len(ids)] = torch.tensor(ids)
        return text

    def too_long(self, caption: str) -> bool:
        """Whether the caption would be cut."""
        return len(self._ids(caption)) + 2 > self.context_length

    def to_dict(self) -> dict[str, Any]:
        sizes = {"context_length": self.context_length, "vocab_size": self.vocab_size}
        return {"kind": "dalle_mini", **sizes, "bpe": self.bpe.to_str()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "DalleMiniBPE":
        return cls(Tokenizer.from_str(state["bpe"]), state["vocab_size"], state["context_length"])


class GlideBPE:
    """The tokenizer of GLIDE: GPT-2's BPE of lower-case text, without start and end. Its largest id, which no
    text can spell, is the pad.
    """

    def __init__(self, bpe: Tokenizer, context_length: Length = 128) -> None:
        self.bpe, self.context_length = bpe, context_length
        self.vocab_size = bpe.get_vocab_size()
        self.pad_id = self.start_id = self.end_id = self.vocab_size - 1

    @classmethod
    def of_files(cls, vocab: dict[str, int], merges: Sequence[str], context_length: Length) -> "GlideBPE":
        """Of the words of encoder.json and the lines of vocab.bpe. Raises ValueError where these are none."""
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("its ids are not those from 0 on, each once")
        pairs: Any = [tuple(line.split()) for line in merges]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a line of the merges is no pair")
        bpe = Tokenizer(models.BPE(vocab, pairs))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return cls(bpe, context_length)

    def _ids(self, caption: str) -> list[int]:
        return self.bpe.encode(caption.lower()).ids

    def __call__(self, captions: Sequence[str]) -> Int64[Tensor, "b t"]:
        """Captions -> (B, context_length) ids; too long ones are cut."""
        text = torch.full((len(captions), self.context_length), self.pad_id, dtype=torch.int64)
        for row, caption in zip(text, captions, strict=True):
            ids = self._ids(caption)[: self.context_length]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return text

    def too_long(self, caption: str) -> bool:
        """Whether the caption would be cut."""
        return len(self._ids(caption)) > self.context_length

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "glide", "context_length": self.context_length, "bpe": self.bpe.to_str()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "GlideBPE":
        return cls(Tokenizer.from_str(state["bpe"]), state["context_length"])


class YttmBPE:
    """The tokenizer of ruDALL-E: a BPE of YouTokenToMe, of lower-case words that begin with a mark; padding,
    unknown, start and end are 0 to 3. Too long captions lose their end.

    Args:
        model: the text of its file: numbers of letters and of merges; letters (code point, id); merges (two
            ids, and the id of both); ids of unknown, padding, start and end.

    Raises:
        ValueError: it is none.
    """

    pad_id, unknown_id, start_id, end_id = 0, 1, 2, 3
    mark, spaces = "\u2581", " \t\n\v\f\r\u2581"

    def __init__(self, model: str, context_length: Length = 128) -> None:
        numbers = [int(number) for number in model.split()]
        letters, merges, *rest = numbers
        if len(rest) != 2 * letters + 3 * merges + 4 or rest[-4:] != [1, 0, 2, 3]:
            raise ValueError("its numbers are not those of letters, merges and the four ids")
        ends = 2 * letters
        self.letters = {chr(point): i for point, i in zip(rest[:ends:2], rest[1:ends:2], strict=True)}
        triples = zip(*(rest[ends + i : -4 : 3] for i in range(3)), strict=True)
        self.merges = {(a, b): (rank, both) for rank, (a, b, both) in enumerate(triples)}
        ids = [*self.letters.values(), *(both for _, both in self.merges.values())]
        if self.mark not in self.letters or sorted(ids) != list(range(4, 4 + letters + merges)):
            raise ValueError("its ids are not those from 4 on, each once")
        self.model, self.context_length, self.vocab_size = model, context_length, 4 + letters + merges

    def _ids(self, caption: str) -> list[int]:
        made: list[int] = []
        for word in caption.lower().translate(dict.fromkeys(map(ord, self.spaces), " ")).split(" "):
            if not word:
                continue
            parts = [self.letters[self.mark]]
            for letter in word:  # letters that are unknown in a row are one token
                i = self.letters.get(letter, self.unknown_id)
                if i != self.unknown_id or parts[-1] != i:
                    parts.append(i)
            while merges := [
                (*self.merges[pair], place)
                for place, pair in enumerate(pairwise(parts))
                if pair in self.merges
            ]:
                _, both, place = min(merges, key=lambda merge: (merge[0], merge[2]))
                parts[place : place + 2] = [both]
            made += parts
        return made

    def __call__(self, captions: Sequence[str]) -> Int64[Tensor, "b t"]:
        """Captions -> (B, context_length) ids; too long ones are cut, end token and all."""
        text = torch.full((len(captions), self.context_length), self.pad_id, dtype=torch.int64)
        for row, caption in zip(text, captions, strict=True):
            ids = [self.start_id, *self._ids(caption), self.end_id][: self.context_length]
            row[: len(ids)] = torch.tensor(ids)
        return text

    def too_long(self, caption: str) -> bool:
        """Whether the caption would be cut."""
        return len(self._ids(caption)) + 2 > self.context_length

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "yttm", "context_length": self.context_length, "bpe": self.model}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "YttmBPE":
        return cls(state["bpe"], state["context_length"])


def tokenizer_from_dict(state: dict[str, Any]) -> TextTokenizer:
    """The tokenizer that `to_dict` described. `kind` may be the name of a class of a trusted package."""
    kind = state.get("kind")
    kinds = {"captions": CaptionTokenizer, "clip": ClipBPE, "dalle_mini": DalleMiniBPE}
    kinds |= {"glide": GlideBPE, "yttm": YttmBPE}
    if isinstance(kind, str) and "." in kind and hasattr(own := listed(kind), "from_dict"):
        return own.from_dict(state)
    if kind not in kinds:
        raise UserError(f"unknown tokenizer {shown(kind)}; this version knows {', '.join(kinds)}.")
    return kinds[kind].from_dict(state)


def tokenizer_facts(tokenizer: TextTokenizer) -> dict[str, Any]:
    """What tells two tokenizers apart, in a few words: stages with other ids do not fit together."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "hash": state_hash(tokenizer.to_dict()),
    }


def state_hash(state: Mapping[str, Any]) -> str:
    """Short hash of what a tokenizer's file says."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def save_tokenizer(tokenizer: TextTokenizer, path: Path) -> None:
    """Writes `tokenizer.json`."""
    write_json(path, tokenizer.to_dict(), indent=None)


def load_tokenizer(path: Path) -> TextTokenizer:
    """Reads what `save_tokenizer` wrote. Raises UserError when it is damaged."""
    advice = "restore it or train the stage again"
    state = read_json(path, TokenizerFile, advice)
    try:
        return tokenizer_from_dict(dict(state))
    except UserError:
        raise
    except Exception as error:  # the package raises bare ones, of whatever it cannot read
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); {advice}") from None
