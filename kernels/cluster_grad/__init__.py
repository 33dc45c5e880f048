"""Gradients of a cluster update, without a dense weight gradient."""

from nest_kernels.cluster_grad.reference import cluster_gradients

__all__ = ["cluster_gradients"]
