"""WF-VAE, the wavelet-flow video autoencoder: model, streaming, conversion of released weights."""
