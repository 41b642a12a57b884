"""Trained stages put together to draw pictures from prompts, and recipes that make the same ones again."""
