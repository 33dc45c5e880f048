"""What the cluster update is compared with, trained by the same loop on the same dialogues."""
