"""Comparisons as config and one runner each; results are committed, tables are made from them."""
