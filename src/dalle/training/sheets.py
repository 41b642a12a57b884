"""Sheets of pictures that callbacks draw at a validation, once in so many steps."""

from pathlib import Path
from typing import Any

import lightning

from dalle.images import save_png
from dalle.ranges import Place, PositiveInt
from dalle.training.loggers import log_picture


class SheetCallback(lightning.Callback):
    """Draws into a folder and to the loggers; a resumed run goes on in the same rhythm.

    Args:
        every: steps between two sheets.
    """

    def __init__(self, directory: Place, every: PositiveInt) -> None:
        self.directory, self.every = Path(directory), every
        self.due = 0

    def take_turn(self, trainer: lightning.Trainer) -> bool:
        """Whether a sheet is due; if so it counts as drawn. All ranks ask."""
        if trainer.global_step < self.due:
            return False
        self.due = (trainer.global_step // self.every + 1) * self.every
        return True

    def draw(self, trainer: lightning.Trainer, name: str, key: str, picture: Any) -> None:
        """The picture as a file of this name and step, and under `key` to the loggers; for the first rank."""
        save_png(picture, self.directory / f"{name}-{trainer.global_step:07d}.png")
        log_picture(trainer, key, picture)

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due = state_dict["due"]
