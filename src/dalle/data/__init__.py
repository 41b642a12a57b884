"""Sources of captioned pictures, tokenizers of text, DataModules, and caches of what frozen networks make.

Image tokenizers are networks (`dalle.nets.dvae`, `dalle.nets.vqgan`); `frozen` wraps them for batches.
"""
