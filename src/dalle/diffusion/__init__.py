"""Noise schedules, the denoiser and its loss, guidance and samplers. The networks are in `dalle.nets`."""
