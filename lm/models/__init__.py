"""Models: one file for each family; `base` has the contract."""
