"""The training loop (`fit`) and what stands around it: callbacks (EMA, grids of samples, tests), checkpoints,
loggers, resuming, checks before the start.
"""
