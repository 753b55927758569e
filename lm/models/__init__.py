"""Models: one file a family; `base` holds the contract."""
