"""Native steps of decoding and layers of training: small C++ beside the torch models they must equal.

    registered model type ─► KERNELS (one file here a family) ─► _native (C++, compiled when Inkling is installed)

A file here packs a model's weights for the C++ under `native/`, without torch. Where no compiler was found at
installation `_native` is missing, and decoding runs on torch instead. A model without a kernel does so too. `training`
is on torch's side: the same C++ as layers with gradients. INKLING_NATIVE=0 turns all of it off.

Every sum has one order: a token's logits are the same bits alone and among others, read at once or one by one, on
any number of threads, with AVX2 and with AVX-512.
"""
