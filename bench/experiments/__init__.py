"""Questions put to tiny models on the real clip, minutes on one core, and whatever comes out.

``overfit``: do dense and sparse learn scenes by heart alike? ``sparsity``: dense, sparse, and
sparse from dense at equal steps, judged on other scenes. ``clipping``: adaptive and fixed
thresholds on gradients, when batches are bad. ``reconstruct``: what a tiny WF-VAE gives back, and
what it does without its wavelets. What came of them is in ``bench/NOTES.md``.
"""
