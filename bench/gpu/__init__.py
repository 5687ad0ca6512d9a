"""A GPU's first fifteen minutes: two runs of a few minutes, each step of which stands alone.

``bench/gpu.sh`` runs this from a checkout; CONTRIBUTING.md says how to spend the fifteen minutes.
A start of a machine costs one to two of them, a command may take ten at most, and a second start
needs four. So run 1, under six minutes, is whole in itself; run 2, under seven, begins at once,
while the machine is held, or on another with the kernels that run 1 compiled.

To be read in this order: ``plan`` says what the two
runs do, in which order, and what each step should take; ``steps`` are the measurements;
``schedule`` is a whole model's layers, executed; ``lab`` is what they work with: inputs, clock,
gates, rows; ``model`` is the arithmetic of the modelled seconds; ``kernels`` and ``counted`` know
what Triton will have to compile, for the steps and for the tests, and ``kept`` carries it from run
to run; ``driver`` watches the processes, stops what hangs, and goes on with the rest; ``__main__``
starts them, and ``table`` sums up.

What must hold on a device that nobody has seen before:

- The most telling step comes first, and each prints and writes its row at once. What fails or
  hangs costs itself only; where it takes the process with it, the next process goes on behind it.
- All timings of a run are of one process, and every ratio is to dense attention timed in turn with
  it. Nothing is timed before it is right on the very case.
- A run that might not fit its limit is not begun: ``--dry-run`` fails where the model of its
  seconds exceeds it.
"""
