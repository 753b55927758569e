"""Native kernels: C++ that does the work of a torch model in fewer and faster steps, with equal results.

    compiled       the compiled module, if this install has it
    counts         n-gram counts as flat arrays, how they are saved, and their compiled lookup
    decoding       registered model type ─► KERNELS (one file a family) ─► a step of decoding, without torch
    dispatch       which operations of training run natively
    layers         training layers with gradients (functions of `autograd`)

The C++ is in `native/`. Without GCC or Clang at installation there is no compiled module. Then, and for models
without a kernel, everything runs on torch. INKLING_NATIVE=0 turns all kernels off.

Every sum has a fixed order. So a token's logits are the same bits alone or in a batch, in one pass or token by token,
on any number of threads, with AVX2 or AVX-512.
"""
