"""SUV, the sparse U-shaped video denoiser: model, sparsity, conversion of released weights."""
