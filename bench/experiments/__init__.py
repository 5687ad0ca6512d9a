"""Questions put to tiny models on the real clip, minutes on one core, and whatever comes out.

``overfit``: do dense and sparse learn scenes by heart alike? ``sparsity``: dense, sparse, and
sparse from dense at equal steps, judged on other scenes. ``extended``: sparse with a linear branch,
and with experts, beside sparse and dense without. ``clipping``: adaptive and fixed
thresholds on gradients, when batches are bad. ``reconstruct``: what does a tiny WF-VAE give back?
``wavelets``: and without its wavelets? What came of them is in ``bench/NOTES.md``.

``toy`` has the data and the tiny SUV, ``learn`` the loop in which models learn side by side,
``outcome`` the report that every experiment leaves, by the same names, and its curves.
"""
