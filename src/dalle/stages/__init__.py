"""A LightningModule for each thing that is trained: `step` is its loss, `sample` what it draws."""
