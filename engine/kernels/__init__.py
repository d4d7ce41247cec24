"""CPU kernels in C, compiled on first use; every one has a torch twin that is its meaning."""
