"""Speed and memory, printed by `make bench`; never asserted in tests."""
