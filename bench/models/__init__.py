"""What the models cost, part by part: time and memory, ways of doing the same thing in turns.

``block`` is one block of SUV, spelled out, as it is, and compiled; ``vae`` is WF-VAE in chunks and
whole, beside other autoencoders; ``cache`` is training from cached features beside training with
encoders. All weights are random: nothing is said about quality here.
"""
