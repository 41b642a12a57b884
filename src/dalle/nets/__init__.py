"""Networks: tensors in, tensors out; no loss, no Lightning. Those of one's own fit `interfaces`."""
