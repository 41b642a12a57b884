"""Drawing codes one after another: temperature, top-k, top-p, guidance, over a cache of keys and values."""
