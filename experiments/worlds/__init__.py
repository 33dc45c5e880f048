"""Forms of the update, controls and LoRA on both micro-worlds, three seeds."""
