"""How fast the operator is: beside dense attention and what people use today, with the ceiling.

``cases`` are the named problems, ``baselines`` what Skiparse attention is held against, ``run``
times them in turns and writes rows; ``tables`` makes the README's tables of these. ``tune``
measures the order of backends for ``backend="auto"``. ``speed/`` is a small set of the cases under
pytest-benchmark, to compare two checkouts: ``pytest bench``.
"""
