"""The optimizer and its learning-rate schedule (`factory`), Muon. The average of weights (EMA) is a callback,
`dalle.training.ema.Ema`.
"""
