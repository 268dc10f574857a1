"""The rollout's kernels, each beside its PyTorch reference. Imports nothing of nanomath."""
