"""DALL-E and DALL-E 2, stage by stage."""

__version__ = "0.1.0"
