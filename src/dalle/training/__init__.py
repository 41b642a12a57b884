"""The training loop (`fit`) and what stands around it: the average of weights (`ema`), callbacks (grids of
samples, tests), checkpoints, loggers, resuming, checks before the start.
"""
