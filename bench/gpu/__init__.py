"""A GPU's first fifteen minutes: two runs of a few minutes, each step of which stands alone.

``bench/gpu.sh`` runs this from a checkout. To be read in this order: ``plan`` says what the two
runs do, in which order, and what each step should take; ``steps`` are the measurements;
``schedule`` is a whole model's layers, executed; ``lab`` is what they work with: inputs, clock,
gates, rows; ``kernels`` counts what Triton will have to compile; ``driver`` starts the processes,
stops what hangs, and goes on with the rest; ``table`` sums up.

What must hold on a device that nobody has seen before:

- The most telling step comes first, and each prints and writes its row at once. What fails or
  hangs costs itself only; where it takes the process with it, the next process goes on behind it.
- All timings of a run are of one process, and every ratio is to dense attention timed in turn with
  it. Nothing is timed before it is right on the very case.
- A run that might not fit its limit is not begun: ``--dry-run`` fails where the model of its
  seconds exceeds it.
"""
