"""Metrics of training and evaluation: FID, KID, precision and recall, inception score (`fid`), CLIP score,
retrieval, reconstructions, the judge of `shapes`. A metric keeps rows (`metric.EvaluationMetric`).
"""
