"""Tensor operations of nest, one folder each: a plain reference and, where it pays, a Triton kernel.

Imported as `nest_kernels`: a package named `kernels` would shadow a library that transformers imports.
"""
