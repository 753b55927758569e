"""Native decoding steps: small C++ beside the torch models that they must equal.

    registered model type ─► KERNELS (one file here a family) ─► _native (C++, compiled when Inkling is installed)

A file here packs a model's weights for the C++ under `native/`, without torch. Where no compiler was found at
installation `_native` is missing, and decoding runs on torch instead. A model without a kernel does so too.

Every sum has one order: a token's logits are the same bits alone and among others, read at once or one by one, on
any number of threads, with AVX2 and with AVX-512.
"""
