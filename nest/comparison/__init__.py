"""Methods, controls and baselines on several worlds and seeds, with the same data, budget and judges."""
