"""AdamW on cluster updates, and the rows that follow from them."""

from nest_kernels.neuron_adamw.reference import adamw_step, updated_rows

__all__ = ["adamw_step", "updated_rows"]
