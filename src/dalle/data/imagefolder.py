"""Class folders `root/CLASS/*.png` as a `Source`: captions are made from the class names."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen

from dalle.data.caption_files import ClassNames
from dalle.data.caption_tables import Columns
from dalle.data.file_listing import Listing
from dalle.data.filters import Filters
from dalle.data.folder import Captioner, Folder
from dalle.data.image_files import MAX_PIXELS, Fit
from dalle.data.splits import Split
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, PositiveInt, Seed, Side, Text


class ImageFolder(Folder):
    """A `Folder` whose captions are class names in a sentence; folders `train/CLASS`, `val/CLASS` work too.

    Args:
        template: one or more sentences with a `{}` for the class name; underscores in it become spaces.
        (all others): as in `Folder`.
    """

    has_classes = True

    def __init__(
        self,
        split: Split,
        root: Place,
        image_size: Side,
        template: Text | Annotated[Sequence[Text], MinLen(1)] = "a photo of a {}",
        crop: Literal["center", "random"] = "center",
        val_fraction: Fraction = 0.05,
        test_fraction: Fraction = 0.05,
        seed: Seed = 0,
        max_pixels: PositiveInt = MAX_PIXELS,
        fit: Fit = "crop",
        filters: Filters | None = None,
        buckets: bool = False,
    ):
        self.templates = sentences(template)
        super().__init__(
            split,
            root,
            image_size,
            crop,
            val_fraction,
            test_fraction,
            seed,
            max_pixels,
            fit=fit,
            filters=filters,
            buckets=buckets,
        )

    def captioner(
        self, listing: Listing, captions: str | Path | None, columns: Columns, first_line: bool
    ) -> Captioner:
        return ClassNames(self.templates)


def sentences(template: str | Sequence[str]) -> tuple[str, ...]:
    """Templates of captions: one or more sentences, each with one ``{}``."""
    templates = (template,) if isinstance(template, str) else tuple(template)
    for sentence in templates:
        if "{}" not in sentence:
            raise UserError(f"template {sentence!r} has no {{}} where the class name goes")
        if re.search(r"[{}]", sentence.replace("{}", "", 1)):
            raise UserError(f"template {sentence!r} has more than the one {{}} where the class name goes")
    if not templates:
        raise UserError("template is an empty list; give at least one sentence with a {}")
    return templates
