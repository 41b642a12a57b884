"""A folder of one's own pictures with captions, or a zip file of one, as a `Source`."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

from dalle.data.caption_files import CaptionFiles, Found, Root
from dalle.data.caption_tables import Columns
from dalle.data.file_listing import ELSEWHERE, Listing, list_files
from dalle.data.filters import Filters
from dalle.data.image_files import MAX_PIXELS, SUFFIXES, UNREADABLE, Fit
from dalle.data.pictures import Catalogue, Pictures
from dalle.data.splits import Split, folder_splits
from dalle.data.zip_files import Archive, is_zip
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, PositiveInt, Seed, Side, Text

Captioner = Callable[[Root, Sequence[str], Mapping[str, int]], Found]


class Folder(Pictures):
    """Pictures of the usual formats anywhere below `root`, with captions.

    Args:
        split: train, val or test.
        root: the folder, or a zip file. Captions: see `CaptionFiles`.
        image_size: S; the short side is resized to it, then the middle square is taken (`crop="center"`) or,
            in training, one drawn per epoch (`crop="random"`).
        val_fraction, test_fraction: of the pictures, where there are no folders `val` and `test`. From three
            different pictures on, no split with a fraction above 0 is empty; fewer are in every split. Equal
            pictures are in one.
        seed: of the splits and crops.
        max_pixels: larger pictures are left out, as their size may be a lie that eats the memory.
        captions: a table, relative to the root; None = what is found.
        image_column, caption_column: of tables, those that hold pictures' names and captions (one or more);
            None: those of the usual names.
        lines: of a .txt beside a picture, `first` or `all` are its captions.
        fit: how a picture becomes a square: `crop`, or `pad` with white, or `squash`.
        filters: which pictures are used; None: all.
        buckets: decoders and upsamplers see pictures in their own shapes, see `buckets`.

    Raises:
        UserError: nothing usable; says what was looked for and what was found.
    """

    def __init__(
        self,
        split: Split,
        root: Place,
        image_size: Side,
        crop: Literal["center", "random"] = "center",
        val_fraction: Fraction = 0.05,
        test_fraction: Fraction = 0.05,
        seed: Seed = 0,
        max_pixels: PositiveInt = MAX_PIXELS,
        captions: Place | None = None,
        image_column: Text | None = None,
        caption_column: Text | Sequence[Text] | None = None,
        lines: Literal["first", "all"] = "all",
        fit: Fit = "crop",
        filters: Filters | None = None,
        buckets: bool = False,
    ):
        self.root = Path(root).expanduser()
        packed = is_zip(self.root)
        if not packed and not self.root.is_dir():
            what = "is not a folder, nor a zip file of one" if self.root.exists() else "does not exist"
            raise UserError(f"data.root={root} {what}; give a folder of pictures with captions")
        listing = Archive(self.root).listing() if packed else list_files(self.root)
        wanted = columns(image_column, caption_column, filters)
        captioner = self.captioner(listing, captions, wanted, lines == "first")
        files = (ZipFiles if packed else Files)(self.root, listing, captioner)
        super().__init__(
            split, files, image_size, crop, val_fraction, test_fraction, seed, max_pixels, fit, filters,
            buckets,
        )  # fmt: skip

    def captioner(
        self, listing: Listing, captions: str | Path | None, columns: Columns, first_line: bool
    ) -> Captioner:
        """Where captions come from: the one thing in which kinds of folders differ."""
        if captions is None:
            return CaptionFiles(columns=columns, first_line=first_line)
        table = self.root / Path(captions).expanduser()
        within = any(name == str(captions) for name, _, _ in listing.files)
        if not within and not table.is_file():
            raise UserError(f"captions={captions}: there is no file {table}")
        stamp = 0 if within else table.stat().st_mtime_ns
        return CaptionFiles(str(captions) if within else str(table), stamp, columns, first_line)


def columns(
    image_column: str | None, caption_column: str | Sequence[str] | None, filters: Filters | None
) -> Columns:
    """Of tables, as settings name them."""
    several = (caption_column,) if isinstance(caption_column, str) else tuple(caption_column or ())
    return Columns(image_column, several, filters.columns if filters else ())


@dataclass(frozen=True)
class Files:
    """A folder as a `Collection`."""

    root: Path
    listing: Listing
    captioner: Captioner

    setting = "data.root"

    @property
    def place(self) -> str:
        return str(self.root)

    @property
    def tree(self) -> Root:
        """What captions are read from."""
        return self.root

    def content(self, name: str) -> Path | bytes:
        return self.root / name

    def find(self) -> Catalogue:
        sizes = {name: size for name, size, _ in self.listing.files}
        pictures = {
            name: (size, time) for name, size, time in self.listing.files if name.lower().endswith(SUFFIXES)
        }
        found = self.captioner(self.tree, list(pictures), sizes)
        out: dict[str, list[str]] = defaultdict(list)
        notes: dict[str, list[str]] = defaultdict(list)
        for name in sizes:
            if name.lower().endswith(UNREADABLE) and not name.lower().endswith(SUFFIXES):
                out["in a format that is not read (save them as PNG or JPEG)"].append(name)
        for name, why in self.listing.odd:
            (notes if why == ELSEWHERE else out)[why].append(name)
        return Catalogue(
            pictures,
            found.captions,
            found.origin,
            (found.sure_splits and found.splits) or folder_splits(pictures) or found.splits,
            dict(chain(found.left_out.items(), out.items())),
            notes,
            found.unread,
            f"{', '.join(SUFFIXES)} with {getattr(self.captioner, 'wanted', 'captions')}",
            f" among {len(sizes)} files",
            found.values,
            found.columns,
        )


@dataclass(frozen=True)
class ZipFiles(Files):
    """A zip file as a `Collection`."""

    @cached_property
    def tree(self) -> Root:
        return Archive(self.root)

    def content(self, name: str) -> Path | bytes:
        archive = self.tree
        assert isinstance(archive, Archive)
        return archive.picture(name)
